"""Head pruning of a model of any kind on samples of its task: load, rank, cut, measure, save, prove."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.data.samples import Samples, read_samples, sample_batches
from secateur.errors import UsageError
from secateur.evaluation.speed import machine
from secateur.evidence.gates import gate_sites
from secateur.evidence.objectives import (
    Batch,
    Objective,
    classification,
    feature_probe,
    language_model,
    sequence_to_sequence,
)
from secateur.export.pruned import save_pruned
from secateur.files import write_json
from secateur.masks.structured import StructuredMask, structure_of
from secateur.methods.head_selection import HeadRules
from secateur.methods.heads import Ranking, prune_heads
from secateur.models.any_model import load_transformer
from secateur.models.shards import SafetensorsFolder
from secateur.progress import SILENT, Progress
from secateur.report import write_report
from secateur.run.heads_proof import keep_probe, measured

HELD_OUT = 0.2
"""Share of the samples, from the end, that measure and do not rank."""


@dataclass(frozen=True)
class HeadRun:
    """What to do.

    Attributes:
        model: hub id or folder of any transformers model.
        data: file of samples (see ``data.samples.read_samples``).
        share: of the heads of ``kinds`` that go.
        kinds: of attention: ``encoder``, ``decoder``, ``cross``; none: all.
        ranking: ``gradient``, ``ablation`` or ``random``.
        rescore: rank anew before every ``step`` of the heads.
        length: tokens a text is cut to; None: 128, or the model's positions.
    """

    model: str
    data: Path
    share: float
    kinds: tuple[str, ...] = ()
    ranking: Ranking = "gradient"
    rescore: bool = False
    step: float = 0.1
    rules: HeadRules = field(default_factory=HeadRules)
    length: int | None = None
    seed: int = 0
    device: str = "auto"


def run_heads(
    job: HeadRun, out: Path, progress: Progress = SILENT, *, command: str = ""
) -> dict[str, Any]:
    """Prune and write ``out`` with its report; what was done and measured, for JSON.

    Args:
        command: how to run this again, for the report.

    Raises:
        SecateurError: naming field, value and fix; ``out`` is then not there.
    """
    start = time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "is there already and is not empty", field="out", value=str(out), fix="choose another"
        )
    samples = read_samples(job.data)
    loaded = load_transformer(job.model, device=job.device, progress=progress)
    model = loaded.model
    objective, measure = _objective(model, samples)
    cut = max(1, round(len(samples) * (1 - HELD_OUT)))
    length = loaded.window(job.length, usual=128)

    def batches(part: Samples) -> list[Batch]:
        found = sample_batches(part, loaded.tokenizer, length) if len(part) else []
        return [{k: v.to(loaded.device) for k, v in batch.items()} for batch in found]

    ranking, held_out = (batches(samples.part(rows)) for rows in (slice(cut), slice(cut, None)))
    parameters = sum(p.numel() for p in model.parameters())
    before = measured(model, held_out, measure)
    sites = {site.name: site for site in gate_sites(model)}
    result = prune_heads(
        model,
        ranking,
        objective,
        share=job.share,
        kinds=job.kinds,
        ranking=job.ranking,
        rules=job.rules,
        step=job.step,
        rescore=job.rescore,
        seed=job.seed,
        progress=progress,
    )
    last = result.cuts[-1]
    after = measured(model, held_out, measure)
    structure = structure_of(model) or StructuredMask()
    record: dict[str, Any] = {
        "secateur": __version__,
        "kind": "heads",
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(job) | {"data": str(job.data)},
        "model": loaded.name,
        "heads": {"of": last.total, "removed": last.removed, "asked": job.share},
        "layers": [
            {
                "name": name,
                "kind": sites[name].kind,
                "heads": len(gone),
                "kept": int((~gone).sum()),
                "gone": gone.nonzero().flatten().tolist(),
                "scores": [round(float(s), 6) for s in result.scores[name]],
            }
            for name, gone in last.gone.items()
        ],
        "query_heads": {name: of - gone for name, (gone, of) in structure.counts().items()},
        "parameters": {"before": parameters, "after": sum(p.numel() for p in model.parameters())},
        "measure": None if measure is None else measure.__name__,
        "held_out": _comparison(measure, before, after, len(samples) - cut),
        "machine": machine(loaded.device),
        "folder": str(out),
    }

    def also(place: Path, saved: dict[str, Any]) -> None:
        inner = place / "secateur"
        inner.mkdir()
        keep_probe(model, ranking[0], measure, inner)
        record.update(
            stored=SafetensorsFolder(place).elements,
            stock=saved["stock"],
            why=saved["why"],
            seconds=round(time.perf_counter() - start, 2),
        )
        write_json(inner / "result.json", record)
        write_report(record, place)

    facts = {"method": "heads", "ranking": job.ranking, "share": job.share}
    save_pruned(model, out, loaded.tokenizer, facts=facts, also=also)
    return record


def _objective(model: nn.Module, samples: Samples) -> tuple[Objective, Objective | None]:
    """What ranks, and what measures (None: the distance of features)."""
    name = type(model).__name__
    paired = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if paired or samples.targets is not None:
        if not paired or samples.targets is None:
            raise UsageError(
                "an encoder-decoder and samples with a target belong together",
                field="data",
                value=name,
                fix='lines such as {"text": "...", "target": "..."} for an encoder-decoder only',
            )
        return sequence_to_sequence, sequence_to_sequence
    if samples.labels is not None:
        classes = int(getattr(getattr(model, "config", None), "num_labels", 0) or 0)
        if not name.endswith("ForSequenceClassification"):
            raise UsageError(
                f"a {name} has no classifier for the labels",
                field="data",
                value="label",
                fix="leave the labels out: heads are then ranked by what they do to the features",
            )
        if not all(0 <= label < classes for label in samples.labels):
            raise UsageError(
                f"the model knows classes 0 to {classes - 1}",
                field="data",
                value=next(x for x in samples.labels if not 0 <= x < classes),
            )
        return classification, classification
    if name.endswith(("CausalLM", "LMHeadModel")):
        return language_model, language_model
    return feature_probe(), None


def _comparison(
    measure: Objective | None, before: Tensor, after: Tensor, samples: int
) -> dict[str, Any] | None:
    if not len(before):
        return None
    if measure is None:
        alike = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        return {
            "what": "cosine of pooled features",
            "samples": samples,
            "mean": float(alike.mean()),
        }
    return {
        "what": "loss, nats",
        "samples": samples,
        "dense": float(before.mean()),
        "pruned": float(after.mean()),
    }
