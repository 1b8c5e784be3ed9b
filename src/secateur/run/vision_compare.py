"""Several methods and targets on one vision network: a run's folder for each, one table.

A cell that is finished is read, so an interrupted comparison goes on; a network that has to be trained
first is trained once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.errors import UsageError
from secateur.files import write_json
from secateur.progress import SILENT, Progress
from secateur.recipe_vision import VisionRecipe
from secateur.run.folder import writable
from secateur.run.results import read_result
from secateur.run.vision import execute_vision
from secateur.run.vision_session import vision_method
from secateur.training.sharding import processes

DENSE = "dense"


def compare_vision(
    recipe: VisionRecipe,
    names: list[str],
    targets: list[str],
    out: Path,
    *,
    progress: Progress = SILENT,
    command: str = "",
) -> dict[str, Any]:
    """Prune and measure every method at every target.

    Args:
        recipe: everything but method and target.
        names: methods. targets: shares as text.
        out: folder for the runs (``METHOD-TARGET`` each, and ``dense``), the table and the page.
        progress, command: as of ``execute_vision``.

    Returns:
        ``cells[method][target]`` with accuracy, delivered share, ratios of FLOPs and time;
        ``dense``, ``protocol``.

    Raises:
        UsageError: no methods or targets, unknown ones; nothing is measured.
    """
    if not names or not targets:
        raise UsageError("needs at least one of each", field="methods, target", value=[])
    if processes() > 1:
        raise UsageError("comparisons use one process", field="ranks", value=processes())
    if recipe.evaluation is None:
        raise UsageError("a comparison measures accuracy", field="evaluation", value=None)
    cells = {(n, t): _recipe(recipe, method=n, target=t) for n in names for t in targets}
    for name in names:
        vision_method(name)
    writable(out)
    if (out / "secateur" / "run.json").exists():
        raise UsageError("holds a run, whose report would be lost", field="out", value=str(out))
    trained = None
    if recipe.pretraining is not None:
        trained = out / DENSE
        whole = _recipe(recipe, method="channel-random", target=0.0, training=None, recalibrate=0)
        _done(whole, trained, progress, command)
    table: dict[str, dict[str, Any]] = {name: {} for name in names}
    dense = protocol = None
    for (name, target), one in cells.items():
        if trained is not None:
            one = _recipe(one, model=str(trained), model_options={}, pretraining=None)
        progress.note(f"{name} at {target}")
        result = _done(one, out / f"{name}-{target.rstrip('%')}", progress, command)
        quality = result["quality"]
        dense, protocol = quality["dense"]["accuracy"], quality["protocol"]
        table[name][target] = {
            "accuracy": quality["pruned"]["accuracy"],
            "stderr": quality["pruned"]["stderr"],
            "cut": quality.get("cut", quality["pruned"])["accuracy"],  # some cut as they train
            "agreement": quality["agreement"],
            "delivered": result["totals"]["delivered"],
            "kind": result["totals"]["kind"],
            "flops": result["flops"]["ratio"],
            "speed": None if result["speed"] is None else result["speed"]["forward"]["ratio"],
        }
    record = {
        "kind": "vision-comparison",
        "secateur": __version__,
        "command": command,
        "model": recipe.model,
        "methods": names,
        "targets": targets,
        "cells": table,
        "dense": dense,
        "protocol": protocol,
    }
    from secateur.report.vision_comparison import write_vision_comparison

    write_vision_comparison(record, out)
    write_json(out / "comparison.json", record)
    return record


def _recipe(recipe: VisionRecipe, **changes: Any) -> VisionRecipe:
    return VisionRecipe.build(recipe.model_dump() | changes)


def _done(recipe: VisionRecipe, out: Path, progress: Progress, command: str) -> dict[str, Any]:
    """A run's record; a finished folder of the same settings is only read."""
    if (out / "secateur" / "result.json").exists():
        found = read_result(out)
        if found["recipe"] == recipe.model_dump(mode="json"):
            return found
    return execute_vision(recipe, out=out, progress=progress, command=command).report
