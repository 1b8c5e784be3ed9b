"""Every allocator of the registry: held-out perplexity under its plans.

    python -m benchmarks.allocators             # stories260k at 50, 60, 70 %, three calibrations
    python -m benchmarks.allocators --smollm    # SmolLM2-135M-Instruct at 60 %, one calibration
    python -m benchmarks.allocators --tables    # the tables of the figures kept so far

stories260k calibrates on text it sampled itself (a seed each) and is measured on other such
text; every run is an ordinary one. SmolLM2 calibrates on WikiText-2's validation part and is
measured on its test part; what is read off the dense model (moments, readings, scores) is
gathered once, every plan is made once and applied to those stored moments with Wanda and
SparseGPT. Figures are kept as they come, so an interrupted benchmark goes on, and an allocator
added later is measured alone. $SECATEUR_DATA is the folder with both data sets.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, arguments, finish
from benchmarks.stories import CACHE, sampled_windows, stories_folder
from secateur.allocation import Plan, allocators
from secateur.data.windows import Windows
from secateur.evaluation.perplexity import fidelity
from secateur.files import write_json
from secateur.models.loading import load
from secateur.models.state import evaluating
from secateur.recipe import Recipe
from secateur.run.planning import make_plan
from secateur.run.readings import gather_readings
from secateur.run.runner import prune_blocks
from secateur.run.session import Session, allocator_of, prepare, resolve

DATA = Path(os.environ.get("SECATEUR_DATA", Path(__file__).parents[2] / "shared" / "data"))
METHODS = ("wanda", "sparsegpt")
# Beside every allocator as it comes: variants worth a line of their own.
VARIANTS: dict[str, dict[str, Any]] = {
    "als, blocks only": {"name": "als", "components": False},
    "als, interior": {"name": "als", "solution": "interior"},
    "als, bounds 0.2": {"name": "als", "width": 0.2},
    "incremental, linear": {"name": "incremental", "shape": "linear"},
    "incremental, decrease": {"name": "incremental", "direction": "decrease"},
    "dsa, searched": {"name": "dsa", "search": 30},
}
# On SmolLM2 a SparseGPT plan takes minutes, a Wanda plan seconds: only these get both.
SMOLLM_SPARSEGPT = ("uniform", "owl", "dlp", "als", "incremental", "atp")
SMOLLM_VARIANTS = ("incremental, linear", "als, blocks only")


def entries(variants: tuple[str, ...]) -> dict[str, str | dict[str, Any]]:
    """Label -> allocation of a recipe, uniform first."""
    first = ("uniform", "owl", "dsa", "dlp", "als", "incremental", "alphapruning", "atp")
    rest = [n for n in allocators if n not in (*first, "erk")]  # on linears ERK is ER
    out: dict[str, str | dict[str, Any]] = {n: n for n in (*first, *rest)}
    out |= {v: VARIANTS[v] for v in variants if VARIANTS[v]["name"] in allocators}
    return out


class Cells:
    """Figures on disk by ``method|target|allocator|seed``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.cells = json.loads(path.read_text())["cells"]

    def put(self, key: str, cell: dict[str, Any]) -> None:
        """Keep a figure."""
        self.cells[key] = cell
        write_json(self.path, {"cells": self.cells})
        print(f"{key}: {cell['perplexity']:.3f} ({cell['seconds']:.1f} s)", flush=True)


def stories(cells: Cells) -> None:
    """All allocators on stories260k."""
    loaded = load(str(stories_folder()), dtype="float32")
    texts = {seed: sampled_windows(32, seed) for seed in (0, 1, 2)}
    held_out = Windows(sampled_windows(48, 1000))
    for seed, ids in texts.items():
        variants = () if seed else tuple(VARIANTS)  # one calibration tells enough of those
        for method in METHODS:
            for sparsity in (0.5, 0.6, 0.7):
                measure(cells, loaded, ids, held_out, method, sparsity, seed, variants)


def measure(
    cells: Cells,
    loaded: Any,
    ids: Tensor,
    held_out: Windows,
    method: str,
    sparsity: float,
    seed: int,
    variants: tuple[str, ...],
) -> None:
    """Ordinary runs of one method at one sparsity under every allocation."""
    todo = {
        label: allocation
        for label, allocation in entries(variants).items()
        if f"{method}|{sparsity}|{label}|{seed}" not in cells.cells
    }
    if not todo:
        return
    base = Recipe.build(
        {
            "model": "stories260k",
            "method": method,
            "sparsity": sparsity,
            "calibration": {"samples": len(ids), "length": ids.shape[1]},
            "evaluation": None,
            "allocation": "als",
        }
    )
    session = prepare(base, loaded, ids)
    session.evaluation = held_out
    with evaluating(loaded.model), tempfile.TemporaryDirectory() as root:
        dense = session.states(held_out).compute()
        originals = [m.tensor().clone() for m in session.view.matrices()]
        for label, allocation in todo.items():
            start = time.perf_counter()
            step = replace(session, recipe=base.model_copy(update={"allocation": allocation}))
            plan = make_plan(step, Path(root))
            prune_blocks(step, plan)
            cell = quality(step, dense, held_out, plan)
            restore(session, originals)
            cell["seconds"] = round(time.perf_counter() - start, 2)
            cells.put(f"{method}|{sparsity}|{label}|{seed}", cell)


def smollm(cells: Cells) -> None:
    """All allocators on SmolLM2 at 60 %: one gathering, one plan each, stored moments."""
    start = time.perf_counter()
    base = Recipe.build(
        {
            "model": "demo",
            "method": "wanda",
            "sparsity": 0.6,
            "calibration": {
                "text": str(DATA / "wikitext-2" / "valid.txt"),
                "samples": 8,
                "length": 512,
            },
            "search": {"samples": 2, "length": 512},
            "evaluation": {
                "text": str(DATA / "wikitext-2" / "test.txt"),
                "length": 512,
                "windows": 4,
                "speed": False,
            },
            "propagate": "dense",
            "allocation": "als",
        }
    )
    session = prepare(base)
    windows = session.evaluation
    assert windows is not None
    root = CACHE / "allocators-smollm"
    plans = root / "plans"
    with evaluating(session.loaded.model):
        dense = session.states(windows).compute()
        originals = [m.tensor().clone() for m in session.view.matrices()]
        spent = {"loading and dense model": time.perf_counter() - start}
        found = entries(SMOLLM_VARIANTS)
        begun = time.perf_counter()
        asked = [allocator_of(base.model_copy(update={"allocation": a})) for a in found.values()]
        gather_readings(session, [r for a in asked if a for r in a.readings()], root)
        spent["one pass for all allocators"] = time.perf_counter() - begun
        print(json.dumps(spent), flush=True)
        order = [(label, "wanda") for label in found]
        order += [(label, "sparsegpt") for label in SMOLLM_SPARSEGPT if label in found]
        for label, method in order:
            key = f"{method}|0.6|{label}|0"
            if key in cells.cells:
                continue
            begun = time.perf_counter()
            recipe = base.model_copy(update={"method": method, "allocation": found[label]})
            chosen, scope, update = resolve(recipe)
            step = replace(session, recipe=recipe, method=chosen, scope=scope, update=update)
            plan = plan_once(step, plans / f"{label}.json", root)
            planned = time.perf_counter()
            prune_blocks(step, plan, None, root)
            pruned = time.perf_counter()
            cell = quality(step, dense, windows, plan)
            restore(session, originals)
            cell["plan_seconds"] = round(planned - begun, 2)
            cell["prune_seconds"] = round(pruned - planned, 2)
            cell["seconds"] = round(time.perf_counter() - begun, 2)
            cells.put(key, cell)


def plan_once(step: Session, path: Path, root: Path) -> Plan:
    """The allocator's plan with Wanda's scores, whatever method it is for; kept on disk."""
    if path.exists():
        return Plan.of_record(json.loads(path.read_text()))
    method, scope, update = resolve(step.recipe.model_copy(update={"method": "wanda"}))
    plan = make_plan(replace(step, method=method, scope=scope, update=update), root)
    write_json(path, plan.record())
    return plan


def quality(step: Session, dense: Any, windows: Windows, plan: Plan) -> dict[str, Any]:
    """Held-out perplexity and KL of the model as it is now, and what its plan asked."""
    pruned = step.states(windows).compute()
    found = fidelity(dense.logits, pruned.logits, windows)
    ratios = plan.ratios.values()
    return {
        "perplexity": found["pruned"]["perplexity"],
        "dense": found["dense"]["perplexity"],
        "kl": found["kl"],
        "removed": plan.removed / plan.elements,
        "least": round(min(ratios), 4),
        "most": round(max(ratios), 4),
        "notes": plan.provenance.get("notes", []),
        "protocol": found["protocol"],
    }


def restore(session: Session, originals: list[Tensor]) -> None:
    """Put the dense weights back."""
    for matrix, weight in zip(session.view.matrices(), originals, strict=True):
        matrix.write(weight)


def table(cells: dict[str, dict[str, Any]], method: str) -> list[str]:
    """Markdown rows: median perplexity over seeds (lowest to highest), best first."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, cell in cells.items():
        name, target, label, _ = key.split("|")
        if name == method:
            found.setdefault(label, {}).setdefault(target, []).append(cell["perplexity"])
    targets = sorted({t for by in found.values() for t in by})

    def rank(label: str) -> float:
        return sum(
            statistics.median(found[label].get(t, [float("inf")]))
            / statistics.median(found["uniform"][t])
            for t in targets
        )

    def text(values: list[float]) -> str:
        middle = f"{statistics.median(values):.2f}"
        return middle if len(values) < 2 else f"{middle} ({min(values):.2f} to {max(values):.2f})"

    rows = [f"| {method} | " + " | ".join(f"{float(t):.0%}" for t in targets) + " |"]
    rows.append("|---|" + "---|" * len(targets))
    for label in sorted(found, key=rank):
        line = [text(found[label][t]) if t in found[label] else "" for t in targets]
        rows.append(f"| {label} | " + " | ".join(line) + " |")
    return rows


def main() -> int:
    """Measure what is missing, then print the tables."""
    parser = arguments(__doc__)
    parser.add_argument("--smollm", action="store_true", help="SmolLM2 at 60 %%")
    parser.add_argument("--tables", action="store_true", help="print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "allocators_smollm" if options.smollm else "allocators"
    path = options.json or RESULTS / f"{name}.json"
    cells = Cells(path)
    if not options.tables:
        (smollm if options.smollm else stories)(cells)
        seconds = sum(c["seconds"] for c in cells.cells.values())
        figures = {"cells": cells.cells, "seconds": round(seconds, 1)}
        finish("allocators", figures, path)
    dense = {round(c["dense"], 3) for c in cells.cells.values()}
    print(f"dense: {sorted(dense)}")
    for method in METHODS:
        print("\n".join(["", *table(cells.cells, method)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
