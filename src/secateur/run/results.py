"""The result of a run: put together, published, read again, verified and explained."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.allocation.plan import Plan
from secateur.allocation.summary import summary
from secateur.errors import UsageError
from secateur.evaluation.speed import machine
from secateur.models.structured_saving import read_manifest
from secateur.run.engine import BlockResult
from secateur.run.folder import RunFolder
from secateur.run.session import Session


def assemble(
    session: Session,
    plan: Plan,
    results: list[BlockResult],
    *,
    command: str,
    quality: dict[str, Any] | None,
    size: dict[str, Any] | None,
    speed: dict[str, Any] | None,
    zeros: int,
    memory_peak: int,
    reopened: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything known about a run as one JSON-able record (the report's only input)."""
    modules = [m for result in results for m in result.modules]
    noted = [m for m in modules if m.get("notes")]
    notes = [*session.loaded.notes, *session.notes]
    if noted:
        notes.append(
            f"{len(noted)} matrices carry a note, e.g. {noted[0]['name']}: {noted[0]['notes'][0]}"
        )
    parameters = sum(p.numel() for p in session.loaded.model.parameters())
    return {
        "secateur": __version__,
        "command": command,
        "recipe": session.recipe.model_dump(mode="json"),
        "resolved": {"scope": str(session.scope), "update": session.update},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": session.loaded.name,
            "parameters": parameters,
            "fingerprint": session.loaded.fingerprint,
            "notes": session.loaded.notes,
        },
        "calibration": None if session.calibration is None else session.calibration.record,
        "modules": modules,
        "blocks": [
            {"index": r.index, "error": r.error, "seconds": sum(r.seconds.values())}
            for r in results
        ],
        "totals": {
            "asked": plan.removed / max(1, plan.elements),
            "delivered": zeros / max(1, plan.elements),
            "zeros": zeros,
            "elements": plan.elements,
            "pattern": str(plan.target) if plan.target.is_pattern else None,
        },
        "allocation": summary(plan),
        "excluded": session.view.excluded,
        "quality": quality,
        "size": size,
        "speed": speed,
        "timing": {k: round(v, 3) for k, v in session.timing.items()},
        "memory_peak": memory_peak,
        "machine": machine(session.device),
        "notes": notes,
        "reopened": reopened,
        "verified": True,
    }


def publish(report: dict[str, Any], folder: RunFolder) -> None:
    """Save ``result.json`` and the report's pages."""
    from secateur.report import write_report

    report["folder"] = str(folder.path)
    folder.save("result.json", report)
    write_report(report, folder.path)


def read_result(folder: Path) -> dict[str, Any]:
    """A finished run's record.

    Raises:
        UsageError: not a run's folder, or an unfinished run.
    """
    path = folder / "secateur" / "result.json"
    if not path.exists():
        unfinished = (folder / "secateur" / "run.json").exists()
        raise UsageError(
            "the run is not finished" if unfinished else "not a run's folder",
            field="folder",
            value=str(folder),
            fix="run the same 'secateur prune' again; it goes on where it stopped"
            if unfinished
            else "a folder written by 'secateur prune --out'",
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise UsageError("the record is damaged", field="folder", value=str(path)) from None
    return record


def explain(folder: Path, module: str) -> dict[str, Any]:
    """What a run remembers of one matrix, or all whose name contains ``module``."""
    report = read_result(folder)
    if report.get("kind") == "vision":
        from secateur.run.vision_commands import explain_vision

        return explain_vision(folder, report, module)
    if report.get("kind") == "heads":
        return _explain_heads(report, module)
    modules = report["modules"]
    if report.get("structure"):
        return _explain_group(folder, report, module)
    exact = [m for m in modules if m["name"] == module]
    found = exact or [m for m in modules if module in m["name"]]
    if not found:
        import difflib

        near = difflib.get_close_matches(module, [m["name"] for m in modules], n=1)
        raise UsageError(
            "the run has no such matrix",
            field="module",
            value=module,
            fix=f"did you mean '{near[0]}'?" if near else f"e.g. {modules[0]['name']}",
        )
    if len(found) > 1:
        rows = [
            {
                "name": m["name"],
                "sparsity": m["delivered_count"] / (m["shape"][0] * m["shape"][1]),
                "error": m["output_error"],
            }
            for m in found
        ]
        return {"matches": rows}
    errors = [m["output_error"] or 0.0 for m in modules]
    own = found[0]["output_error"] or 0.0
    return {
        "module": found[0],
        "method": report["recipe"]["method"],
        "rank": 1 + sum(e > own for e in errors),
        "modules": len(modules),
    }


def _explain_group(folder: Path, report: dict[str, Any], name: str) -> dict[str, Any]:
    """What a structured run remembers of one group, or all whose name contains ``name``."""
    groups = report["structure"]["groups"]
    found = [g for g in groups if g["name"] == name] or [g for g in groups if name in g["name"]]
    if not found:
        raise UsageError(
            "the run has no such group", field="module", value=name, fix=f"e.g. {groups[0]['name']}"
        )
    if len(found) > 1:
        rows = [
            {"name": g["name"], "sparsity": g["removed"] / g["before"], "error": None}
            for g in found
        ]
        return {"matches": rows, "groups": found}
    entry = ((read_manifest(folder) or {}).get("groups") or {}).get(found[0]["name"])
    kept = set(entry["kept"]) if entry else set()
    gone = [n for n in range(entry["of"]) if n not in kept] if entry else []
    return {"group": found[0], "method": report["recipe"]["method"], "gone": gone}


def _explain_heads(report: dict[str, Any], name: str) -> dict[str, Any]:
    """What ``secateur heads`` remembers of the layers whose name contains ``name``."""
    layers = [layer for layer in report["layers"] if name in layer["name"]]
    if not layers:
        example = report["layers"][0]["name"]
        raise UsageError(
            "no such layer of heads", field="module", value=name, fix=f"e.g. {example}"
        )
    rows = [
        {
            "name": layer["name"],
            "sparsity": len(layer["gone"]) / layer["heads"],
            "error": None,
        }
        for layer in layers
    ]
    return {"matches": rows, "layers": layers}
