"""What trying a plan costs, what workers bring, and what a search finds on a real small model.

    python -m benchmarks.dsa_search            # stories260k from $SECATEUR_DATA, SmolLM2-135M

1. A trial (masks applied, blocks run, divergence taken) against the plain transformers forward,
   with logits, of the same windows through the model pruned by the same plan; in turns, process
   CPU seconds, one thread. Wanted: no more than 1.2 times.
2. The same search again in its folder: every plan is found in the journal.
3. Plans a second with two worker processes against one, wall time, both pools warm, in turns.
   It depends on the cores that are free: the load of the machine is recorded beside it.
4. A search at 70 % on stories260k, three seeds: calibrated and searched on stories the model
   wrote itself, measured on others and on its published samples, beside uniform, OWL, ATP and the
   published function. Also with ``propagate: dense``, where a run's masks are those searched on
   (otherwise each block's scores are gathered anew behind the blocks pruned before it).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, alternate, arguments, finish, ratio, spread, verdict
from benchmarks.stories import sampled_windows, stories_folder
from secateur.allocation import allocators
from secateur.allocation.search.engine import Job, SearchSettings
from secateur.allocation.search.executors import Processes
from secateur.masks.selection import select
from secateur.models.loading import load
from secateur.recipe import Recipe
from secateur.run.plan_search import search_plan
from secateur.run.planning import problem_of
from secateur.run.runner import execute
from secateur.run.session import Session, prepare
from secateur.run.trial_of import search_windows, sorted_scores
from secateur.run.trials import Trials
from secateur.run.trials_store import OpenTrials, write_trials

LIMIT = 1.2
WORKERS = 0.8


def opened(model: str, samples: int, length: int) -> tuple[Session, Trials, dict[str, Any]]:
    """A session, its trials in one rung, and what they were made of."""
    recipe = Recipe.build(
        {
            "model": model,
            "sparsity": 0.7,
            "calibration": {"samples": 4, "length": 128},
            "search": {"samples": samples, "length": length},
            "evaluation": None,
        }
    )
    session = prepare(recipe)
    owl = allocators["owl"].with_options({})
    problem = problem_of(session, (owl,))
    windows = search_windows(session)
    assert problem.scores is not None
    rankings, _ = sorted_scores(session, problem.scores)
    trials = Trials(session.view, rankings, windows, recipe.target, rungs=[samples])
    parts = {
        "plan": owl.plan(problem),
        "windows": windows,
        "rankings": rankings,
        "problem": problem,
    }
    return session, trials, parts


def candidate_cost(model: str, samples: int, length: int, rounds: int) -> dict[str, Any]:
    """A trial against the forward of the pruned model, in turns."""
    session, trials, parts = opened(model, samples, length)
    plan, windows = parts["plan"], parts["windows"]
    dense = {m.name: m.tensor().clone() for m in session.view.matrices()}
    pruned: dict[str, Tensor] = {}
    for name, score in parts["problem"].scores():
        mask = select(score, plan.cut(name, session.scope))
        pruned[name] = dense[name].masked_fill(mask, 0)
    counts = tuple(plan.counts.values())
    size = max(1, 2048 // length)

    def trial() -> None:
        trials(counts, 0)

    @torch.no_grad()
    def forward() -> None:
        for ids in windows.ids.split(size):
            session.loaded.model(input_ids=ids, use_cache=False)

    def with_weights(weights: dict[str, Tensor]) -> None:
        for m in session.view.matrices():
            m.tensor().copy_(weights[m.name])

    # The plain forward runs on the pruned weights; trials mask the dense ones, so each turn
    # starts with its own weights in place (not timed).
    seconds: dict[str, list[float]] = {"trial": [], "forward": []}
    for turn in range(rounds + 1):
        for name in ("trial", "forward") if turn % 2 == 0 else ("forward", "trial"):
            with_weights(dense if name == "trial" else pruned)
            got = alternate({name: trial if name == "trial" else forward}, 1)[name]
            if turn:  # the first warms up
                seconds[name] += got
    with_weights(dense)
    times = ratio(seconds["trial"], seconds["forward"])
    print(f"  {model}: a trial is {times['median']} forwards  {verdict(times['median'], LIMIT)}")
    return {
        "windows": [samples, length],
        "trial_seconds": spread(seconds["trial"]),
        "forward_seconds": spread(seconds["forward"]),
        "times_a_forward": times,
        "limit": LIMIT,
    }


def cache_hits(stories: str) -> dict[str, Any]:
    """A search, and the same search again from its journal."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.build(
            {
                "model": stories,
                "sparsity": 0.7,
                "allocation": "dsa",
                "calibration": {"samples": 4, "length": 128},
                "search": {"samples": 16, "length": 128},
                "evaluation": None,
            }
        )
        settings = SearchSettings(budget=60, offspring=8)
        first = search_plan(recipe, Path(folder) / "s", settings=settings)
        again = search_plan(recipe, Path(folder) / "s", settings=settings)
    assert first["history"] == again["history"]
    # ``seconds`` includes opening the trials (the dense forward) both times.
    figures = {"plans": 60, "first_seconds": first["seconds"], "again_seconds": again["seconds"]}
    figures["share"] = round(again["seconds"] / first["seconds"], 3)
    print(f"  60 plans {first['seconds']} s, the same from the journal {again['seconds']} s")
    return figures


def throughput(model: str, samples: int, length: int, jobs: int, rounds: int) -> dict[str, Any]:
    """Plans a second of two workers against one, pools warm, in turns."""
    session, _, parts = opened(model, samples, length)
    plan = parts["plan"]
    with tempfile.TemporaryDirectory() as folder:
        write_trials(Path(folder), parts["rankings"], parts["windows"])
        opener = OpenTrials(
            Path(folder), model, "float32", "cpu", False, None, (), (),
            session.recipe.target, [samples], "kl", 2048,
        )  # fmt: skip
        work: list[Job] = [(tuple(plan.counts.values()), 0)] * jobs
        pools = {name: Processes(opener, number) for name, number in (("one", 1), ("two", 2))}
        try:
            for pool in pools.values():
                list(pool.map(work[:4]))
            ways = {name: lambda pool=pool: list(pool.map(work)) for name, pool in pools.items()}
            seconds = alternate(ways, rounds, clock=time.perf_counter)
        finally:
            for pool in pools.values():
                pool.close()
    gain = ratio(seconds["one"], seconds["two"])
    share = round(gain["median"] / 2, 3)
    load = os.getloadavg()[0]
    verdict_ = "held" if share >= WORKERS else "MISSED"
    print(
        f"  two workers: {gain['median']}x one ({share} N, load {load:.1f}); >= 0.8 N: {verdict_}"
    )
    return {
        "jobs": jobs,
        "two_over_one": gain,
        "share_of_two": share,
        "wanted": WORKERS,
        "cores": os.cpu_count(),
        "load_average": round(load, 2),
    }


def written(seed: int, documents: int = 96) -> str:
    """Stories the model wrote itself."""
    tokenizer = load(str(stories_folder())).tokenizer
    ids = sampled_windows(documents, seed)
    return "\n\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))


def real_search(stories: str, budget: int, seeds: int) -> dict[str, Any]:
    """Found plans on texts nobody searched on, beside the plans one could have had at once."""
    published = Path(stories) / "sample_texts.txt"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, seed in (("search", 201), ("held", 202), ("calibration", 203)):
            (folder / f"{part}.txt").write_text(written(seed))
        for seed in range(seeds):
            recipe: dict[str, Any] = {
                "model": stories,
                "sparsity": 0.7,
                "calibration": {
                    "text": str(folder / "calibration.txt"), "samples": 32, "length": 128,
                    "seed": seed,
                },
                "search": {
                    "text": str(folder / "search.txt"), "samples": 32, "length": 128, "seed": seed,
                },
                "evaluation": {"text": str(folder / "held.txt"), "length": 128, "windows": None},
            }  # fmt: skip
            allocations: dict[str, Any] = {
                "uniform": "uniform",
                "owl": "owl",
                "dsa, published": "dsa",
                "atp, searched": "atp",
            }
            searched: dict[str, Any] = {}
            for space in ("dsa", "ratios"):
                out = folder / f"{space}-{seed}"
                record = search_plan(
                    Recipe.build({**recipe, "allocation": "dsa"}),
                    out,
                    space=space,
                    settings=SearchSettings(budget=budget, offspring=8, seed=seed),
                )
                allocations[f"{space}, searched"] = str(out / "plan.json")
                searched[space] = {
                    "best": record["best"],
                    "uniform": record["history"][0]["value"],
                    "owl": record["history"][1]["value"],
                    "seconds": record["seconds"],
                }
            row: dict[str, Any] = {"seed": seed, "search": searched, "perplexity": {}}
            for label, allocation in allocations.items():
                row["perplexity"][label] = {}
                for where, text, propagate in (
                    ("held-out stories", folder / "held.txt", "pruned"),
                    ("published samples", published, "pruned"),
                    ("held-out, the masks searched on", folder / "held.txt", "dense"),
                ):
                    changes = {
                        "allocation": allocation,
                        "propagate": propagate,
                        "evaluation": {**recipe["evaluation"], "text": str(text), "speed": False},
                    }
                    quality = execute(Recipe.build({**recipe, **changes})).report["quality"]
                    row["perplexity"][label][where] = round(quality["pruned"]["perplexity"], 2)
                    row.setdefault("dense", {})[where] = round(quality["dense"]["perplexity"], 3)
                print(f"  seed {seed}  {label:18} {row['perplexity'][label]}", flush=True)
            rows.append(row)
    return {"sparsity": 0.7, "method": "wanda", "budget": budget, "seeds": rows}


PARTS = ("trial", "cache", "workers", "search")


def main() -> None:
    """The parts asked for; figures of the others stay as they were measured before."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="demo", help="the larger model for the cost of a trial")
    parser.add_argument("--budget", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    stories = str(stories_folder())
    path = given.json or RESULTS / "dsa_search.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    if "trial" in given.only:
        print("cost of a trial")
        name = "stories260k" if given.model == "stories" else given.model
        cost = {"stories260k": candidate_cost(stories, 16, 128, given.rounds)}
        if name != "stories260k":
            cost[name] = candidate_cost(name, 4, 256, given.rounds)
        figures["trial"] = figures.get("trial", {}) | cost
    if "cache" in given.only:
        print("again from the journal")
        figures["cache"] = cache_hits(stories)
    if "workers" in given.only:
        print("two workers")
        figures["workers"] = throughput(stories, 32, 256, 16, given.rounds)
    if "search" in given.only:
        print("search at 70 %")
        figures["search"] = real_search(stories, given.budget, given.seeds)
    kept = {part: figures[part] for part in PARTS if part in figures}
    finish("dsa_search", kept, given.json)


if __name__ == "__main__":
    main()
