"""Several methods and targets on one model: one calibration, many prunings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.errors import UsageError
from secateur.evaluation.perplexity import fidelity
from secateur.files import write_json
from secateur.masks.target import Target
from secateur.methods import Need
from secateur.models.state import evaluating
from secateur.progress import SILENT, Progress
from secateur.recipe import Recipe
from secateur.run.folder import writable
from secateur.run.planning import make_plan
from secateur.run.runner import prune_blocks
from secateur.run.session import Session, needs, prepare, readings_of, resolve


def compare(
    recipe: Recipe,
    names: list[str],
    sparsities: list[str],
    out: Path,
    *,
    progress: Progress = SILENT,
    command: str = "",
) -> dict[str, Any]:
    """Prune and measure every method at every target; the model is restored in between.

    Args:
        recipe: model, calibration and evaluation (its method and sparsity are not used).
        names: ``METHOD``, ``METHOD+UPDATE``, either with ``@ALLOCATOR`` behind it.
        sparsities: targets as text.
        out: folder for the evidence, the table and the page. Figures already there under the
            same settings are kept, so an interrupted comparison goes on.
        progress: where to report.
        command: how to run this again, for the report.

    Returns:
        ``perplexity[method][target]``, ``kl[method][target]``, ``dense``, ``protocol``.
    """
    if recipe.stream:
        raise UsageError("a comparison keeps the model in memory", field="stream", value=True)
    targets = [str(Target.parse(s)) for s in sparsities]
    recipes = {(n, t): _one(recipe, n, t) for n in names for t in targets}
    root = out / "secateur" / "evidence"
    writable(out)
    if (out / "secateur" / "run.json").exists():
        raise UsageError("holds a run, whose report would be lost", field="out", value=str(out))
    # The most demanding first: its full moments then serve every other method.
    order = sorted(recipes, key=lambda k: _appetite(recipes[k]), reverse=True)
    session = prepare(recipes[order[0]], progress=progress)
    windows = session.evaluation
    if windows is None:
        raise UsageError("a comparison needs an evaluation text", field="evaluation", value=None)
    table = _Table(out / "secateur" / "comparison.json", session)
    with evaluating(session.loaded.model):
        dense = session.states(windows).compute(progress, "dense model, evaluating")
        originals = [m.tensor().clone() for m in session.view.matrices()]
        for name, target in order:
            if table.has(name, target):
                continue
            method, scope, update = resolve(recipes[name, target])
            step = replace(
                session, recipe=recipes[name, target], method=method, scope=scope, update=update
            )
            progress.note(f"{name} at {target}")
            prune_blocks(step, make_plan(step, root), None, root)
            pruned = step.states(windows).compute(progress, f"{name} {target}, evaluating")
            table.put(name, target, fidelity(dense.logits, pruned.logits, windows, progress))
            for matrix, weight in zip(session.view.matrices(), originals, strict=True):
                matrix.write(weight)
    record = table.record(names, targets) | {
        "command": command,
        "model": session.loaded.name,
        "propagate": recipe.propagate,
        "calibration": None if session.calibration is None else session.calibration.record,
    }
    write_json(out / "comparison.json", record)
    from secateur.report import write_comparison

    write_comparison(record, out)
    return record


def _one(recipe: Recipe, name: str, target: str) -> Recipe:
    name, _, allocation = name.partition("@")
    method, _, update = name.partition("+")
    values = recipe.model_dump() | {"method": method, "sparsity": target, "pattern": None}
    if allocation:
        values["allocation"] = allocation
    return Recipe.build(values | ({"update": update} if update else {}))


def _appetite(recipe: Recipe) -> tuple[bool, int, bool]:
    wanted = needs(*_parts(recipe))
    reads = any(r.inputs or r.sample for r in readings_of(recipe))
    return Need.GRAM in wanted, len(wanted), reads


def _parts(recipe: Recipe) -> tuple[Any, Any]:
    method, _, update = resolve(recipe)
    return method, update


class _Table:
    """Figures on disk, valid only for the settings they were measured under."""

    def __init__(self, path: Path, session: Session) -> None:
        self.path = path
        assert session.evaluation is not None
        calibration = session.calibration
        self.settings = {
            "model": session.loaded.fingerprint,
            "calibration": None if calibration is None else calibration.fingerprint,
            "evaluation": session.evaluation.fingerprint,
            "dtype": str(next(session.loaded.model.parameters()).dtype),
            "device": session.device.type,
            "secateur": __version__,
            **session.recipe.model_dump(
                mode="json",
                include={
                    "propagate",
                    "granularity",
                    "reconstruct",
                    "scope",
                    "include",
                    "exclude",
                    "allocation",
                },
            ),
        }
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            saved = json.loads(path.read_text())
            if saved.get("settings") == self.settings:
                self.cells = saved["cells"]

    def has(self, name: str, target: str) -> bool:
        return f"{name} {target}" in self.cells

    def put(self, name: str, target: str, quality: dict[str, Any]) -> None:
        self.cells[f"{name} {target}"] = quality
        write_json(self.path, {"settings": self.settings, "cells": self.cells})

    def record(self, names: list[str], targets: list[str]) -> dict[str, Any]:
        """The table as nested dictionaries."""

        def field(*path: str) -> dict[str, dict[str, float]]:
            out: dict[str, dict[str, float]] = {}
            for name in names:
                for target in targets:
                    value: Any = self.cells[f"{name} {target}"]
                    for key in path:
                        value = value[key]
                    out.setdefault(name, {})[target] = value
            return out

        first = self.cells[f"{names[0]} {targets[0]}"]
        return {
            "methods": names,
            "targets": targets,
            "perplexity": field("pruned", "perplexity"),
            "stderr": field("pruned", "stderr"),
            "kl": field("kl"),
            "top1_agreement": field("top1_agreement"),
            "dense": first["dense"]["perplexity"],
            "protocol": first["protocol"],
        }
