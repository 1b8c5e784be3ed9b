"""Proof after the fact of a structured run: manifest, shapes on disk, and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.errors import VerificationError
from secateur.masks.structured import StructuredMask
from secateur.models.shards import SafetensorsFolder
from secateur.models.structured_saving import MANIFEST, read_manifest
from secateur.progress import SILENT, Progress
from secateur.run.structured_saving import reopen_structured


def verify_structured(
    folder: Path, report: dict[str, Any], *, load_model: bool = True, progress: Progress = SILENT
) -> dict[str, Any]:
    """Check a finished structured run against its record; see ``verifying.verify_run``."""
    from secateur.run.verifying import PROBE, read_probe

    manifest = read_manifest(folder)
    if manifest is None:
        raise VerificationError(f"'{folder}' has no {MANIFEST}")
    mask = StructuredMask.parse(manifest, str(folder / MANIFEST))
    structure = report["structure"]
    with progress.stage("verifying", total=3) as advance:
        for row in structure["groups"]:
            gone = mask.gone.get(row["name"])
            kept = None if gone is None else int((~gone).sum()) // row["finest"]
            if (row["removed"] and kept is None) or kept not in (None, row["after"]):
                raise VerificationError(
                    f"'{row['name']}': the report says {row['after']} units stay, "
                    f"the manifest {kept}"
                )
        checks = [f"{len(structure['groups'])} groups keep exactly the units the report says"]
        advance(1)
        count = SafetensorsFolder(folder).elements
        if count != structure["parameters"]["after"]:
            raise VerificationError(
                f"{count:,} parameters on disk, the report says "
                f"{structure['parameters']['after']:,}"
            )
        checks.append(f"{count:,} parameters on disk, as the report says")
        advance(1)
        record: dict[str, Any] = {"parameters": count}
        probe = folder / "secateur" / PROBE
        if load_model and probe.exists():
            saved, kind = read_probe(probe)
            found = reopen_structured(folder, saved["ids"], saved["logits"], kind)
            how = (
                "AutoModelForCausalLM.from_pretrained"
                if structure["form"]["stock"]
                else "secateur.load_pruned"
            )
            checks.append(
                f"opens with {how} and gives the recorded logits "
                f"(largest difference {found['max_difference']:.2g})"
            )
            record |= found
        advance(1)
    return {"folder": str(folder), "verified": True, "checks": checks, **record}
