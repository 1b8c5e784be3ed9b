"""What ALS costs on top of the forwards it needs, and how fast its linear programme is.

    python -m benchmarks.als_speed                 # SmolLM2-135M, its first 10 blocks, 2,048 tokens
    python -m benchmarks.als_speed --blocks 30     # all of it

The yardstick is one dense pass over the windows that hold the sampled tokens, block by block,
without head. ALS is that pass with its hooks, the redundancies within each block, the token
Grams and products between blocks, and both stages of the allocation. In turns, one thread.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.common import alternate, arguments, finish, ratio, spread, verdict
from secateur.allocation.als import ALS
from secateur.models.anatomy import ModelView
from secateur.models.state import evaluating
from secateur.recipe import Recipe
from secateur.run.planning import problem_of
from secateur.run.session import Session, prepare
from secateur.solvers.knapsack import fractional_knapsack, linear_programme


def main() -> None:
    """Measure and record."""
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.build(
        {
            "model": "demo",
            "method": "magnitude",
            "sparsity": 0.5,
            "calibration": {"text": "pydoc", "samples": 4, "length": 512},
            "evaluation": None,
            "allocation": "als",
        }
    )
    session = prepare(recipe)
    shorten(session, options.blocks)
    allocator, found = ALS(), {}

    def forwards() -> None:
        assert session.calibration is not None
        session.replay(session.calibration).to_end()

    def als() -> None:
        found["plan"] = allocator.plan(problem_of(session, (allocator,)))

    with evaluating(session.loaded.model):
        forwards()
        seconds = alternate({"forwards": forwards, "als": als}, options.rounds)
    times = ratio(seconds["als"], seconds["forwards"])
    figures = {
        "blocks": options.blocks,
        "tokens": 2048,
        "forwards_seconds": spread(seconds["forwards"]),
        "als_seconds": spread(seconds["als"]),
        "times_the_forwards": times,
        "limit": 1.5,
        "programme": [programme(n) for n in (30, 80, 560)],
    }
    print(f"ALS / forwards {times['median']:.2f}, {verdict(times['median'], 1.5)}")
    for row in figures["programme"]:
        print(row)
    finish("als_speed", figures, options.json)


def shorten(session: Session, blocks: int) -> None:
    """Keep the first ``blocks`` blocks of a Llama."""
    model = session.loaded.model
    model.model.layers = model.model.layers[:blocks]  # type: ignore[union-attr, index, operator, assignment]
    model.config.num_hidden_layers = blocks  # type: ignore[union-attr, assignment]
    session.view = ModelView.of(model)


def programme(items: int) -> dict[str, float]:
    """Milliseconds of the closed form and of HiGHS, and how far their objectives are apart."""
    random = np.random.default_rng(items)
    value, sizes = random.random(items), random.integers(10_000, 1_000_000, items).tolist()
    values = value.tolist()
    budget, low, high = 0.5 * sum(sizes), [0.4] * items, [0.6] * items

    def timed(solve: object) -> tuple[float, np.ndarray]:
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            x = solve(values, sizes, budget, low, high)  # type: ignore[operator]
            best = min(best, time.perf_counter() - start)
        return best * 1000, x

    ours, x = timed(fractional_knapsack)
    theirs, y = timed(linear_programme)
    return {
        "items": items,
        "closed_form_ms": round(ours, 3),
        "highs_ms": round(theirs, 3),
        "objective_difference": float(abs(value @ x - value @ y) / (value @ y)),
    }


if __name__ == "__main__":
    main()
