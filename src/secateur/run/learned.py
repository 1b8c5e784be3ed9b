"""A mask that is learned: one-shot prior, training over frozen weights, then the cut.

Killed at any moment it goes on: the prior and the training keep their own state, and the
pruned blocks are written only when the training is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from secateur.allocation.plan import Plan
from secateur.data.windows import Windows, training_windows
from secateur.errors import UsageError
from secateur.masks.selection import select
from secateur.masks.store import FILE_NAME, MaskStore, load_masks, save_masks
from secateur.methods import methods
from secateur.methods.base import Method
from secateur.methods.maskllm import MaskLLM
from secateur.methods.prune_matrix import Pruned
from secateur.models.mask_file import MaskFile, save_mask
from secateur.run.checkpoint import Checkpoint
from secateur.run.engine import BlockResult, Engine
from secateur.run.folder import RunFolder
from secateur.run.records import module_record
from secateur.run.session import Session
from secateur.training.distil import distillation_loss
from secateur.training.hooks import eight_bit_adamw
from secateur.training.loop import Batch, Loss, fit, next_token_loss
from secateur.training.mask_logits import bytes_per_weight
from secateur.training.maskllm import LearnedMasks, learnable

MASK = "learned.mask"
"""The file of pattern numbers in a run's folder, for the dense model it was learned on."""
PRIOR = "prior.safetensors"
HELD_OUT = 0.05

Quality = Callable[[], dict[str, Any] | None]
Cut = Callable[[Session, Plan, RunFolder | None, Path | None], list[BlockResult]]


def check_learned(session: Session) -> None:
    """Refuse what cannot be learned, before anything is done.

    Raises:
        UsageError: no N:M target, a survivors' update, streamed weights, a prior that does not fit.
        MissingExtra: what the optimizer needs is not there.
    """
    method = cast(MaskLLM, session.method)
    method.check_target(session.recipe.target)
    if method.optimizer == "adamw8bit":
        eight_bit_adamw()
    if method.prior != "none" and not method.one_shot:
        _given(session, Path(method.prior))
    if session.update != "none":
        raise UsageError(
            "the weights stay as they are while a mask is learned",
            field="update",
            value=session.update,
            fix="leave update out; recover afterwards with --recover perp",
        )
    if session.resident is not None:
        raise UsageError(
            "learning trains through the whole model, which a streamed one is not",
            field="stream",
            value=True,
            fix="leave --stream out",
        )


def learn(
    session: Session,
    plan: Plan,
    folder: RunFolder | None,
    evidence: Path | None,
    quality: Quality,
    one_shot: Cut,
    text: Any = None,
) -> tuple[list[BlockResult], dict[str, Any]]:
    """Learn the masks and cut the model; the blocks' results and the record of the learning.

    Args:
        quality: measures the model as it stands against the dense one.
        one_shot: prunes by a one-shot method, for the prior.
        text: windows or texts in memory, instead of the recipe's calibration text.
    """
    engine = Engine(
        session.view,
        cast(Method, session.method),
        plan,
        session.scope,
        "none",
        ranks=session.ranks,
        stored=session.loaded.stored if folder is not None else None,
    )
    checkpoint = Checkpoint(engine, folder, resident=True)
    record = None if folder is None else folder.read("learning.json")
    if folder is not None and record is not None:
        done = [folder.block_record(b.index) is not None for b in session.view.blocks]
        if all(done):
            return checkpoint.restore(), record
    prior, before = _prior(session, plan, folder, evidence, quality, one_shot)
    masks, record = _trained(session, plan, folder, prior, text)
    record |= {"prior": before}
    if folder is not None and session.ranks.leads:
        words = {"model": session.loaded.fingerprint, "method": session.recipe.method}
        patterns = {n: plan.pattern(n) for n in masks}
        size = save_mask(folder.path / MASK, session.view, masks, patterns, words)
        weights = sum(m.numel() for m in masks.values())
        record["mask_file"] = {"name": MASK, "bytes": size, "bits_per_weight": 8 * size / weights}
        folder.save("learning.json", record)
    results = []
    for block in session.view.blocks:
        result = BlockResult(block.index)
        for matrix in block.matrices:
            mask = masks[matrix.name]
            weight = matrix.tensor().float().masked_fill(mask.to(matrix.stored.device), 0)
            matrix.write(weight if engine.stored is None else weight.to(engine.stored))
            cut = plan.cut(matrix.name, session.scope)
            entry = module_record(
                matrix, block.index, cut, session.scope, "none", Pruned(mask, weight)
            )
            result.modules.append(entry | {"tokens": None, "notes": [], "solve": {}, "seconds": 0})
            result.masks = {**result.masks, matrix.name: mask}
        checkpoint.save(block, result)
        results.append(result)
    return results, record


@torch.no_grad()
def _prior(
    session: Session,
    plan: Plan,
    folder: RunFolder | None,
    evidence: Path | None,
    quality: Quality,
    one_shot: Cut,
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """The mask that is started from, and what it is worth; the model stays dense."""
    method = cast(MaskLLM, session.method)
    record: dict[str, Any] = {"name": method.prior, "quality": None}
    if method.prior == "none":
        return None, record
    path = None if folder is None else folder.inner / PRIOR
    if path is not None and path.exists() and folder is not None:
        return dict(load_masks(path)), folder.read("prior.json") or record
    dense = {m.name: m.tensor().clone() for m in session.view.matrices()}
    try:
        if method.one_shot:
            earlier = replace(
                session,
                method=methods[method.prior](),
                # As published: one pass through the dense model.
                recipe=session.recipe.model_copy(update={"propagate": "dense"}),
            )
            masks = {
                n: m for r in one_shot(earlier, plan, None, evidence) for n, m in r.masks.items()
            }
        else:
            stored = _given(session, Path(method.prior))
            masks = {name: stored[name] for name in session.shapes}
            for matrix in session.view.matrices():
                matrix.tensor().masked_fill_(masks[matrix.name].to(matrix.stored.device), 0)
        if session.ranks.leads:
            record["quality"] = quality()
    finally:
        for matrix in session.view.matrices():
            matrix.tensor().copy_(dense[matrix.name])
    if path is not None and folder is not None and session.ranks.leads:
        folder.save("prior.json", record)
        save_masks(path, masks)
    return masks, record


def _given(session: Session, path: Path) -> MaskFile | MaskStore:
    """The masks of a file or a run's folder, one for every matrix."""
    if path.is_dir() and not (path / FILE_NAME).exists():
        raise UsageError(
            "holds no masks",
            field="prior",
            value=str(path),
            fix="the folder of a run, or a mask file",
        )
    stored = MaskFile(path) if path.suffix == ".mask" else load_masks(path)
    for name, shape in session.shapes.items():
        if stored.shapes.get(name) != shape:
            raise UsageError(
                f"holds no mask that fits '{name}'",
                field="prior",
                value=str(path),
                fix="a mask of this model, such as another run's folder",
            )
    return stored


def _trained(
    session: Session,
    plan: Plan,
    folder: RunFolder | None,
    prior: Mapping[str, Tensor] | None,
    text: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Learn all masks, in turns if asked for; the masks and the record."""
    method = cast(MaskLLM, session.method)
    cuts = {name: plan.cut(name, session.scope) for name in session.shapes}
    patterns = {n: (c.keep, c.group) for n, c in cuts.items() if c.keep and c.group}
    data, held = _data(session, method, text)
    masks = dict(prior or {})
    record: dict[str, Any] = {}
    changed = groups = 0.0
    with session.timed("learning"):
        for turn, names in enumerate(_shares(session, method.turns)):
            learned, part = _turn(session, folder, patterns, masks, data, held, turn, names)
            masks |= learned
            count = sum(mask.numel() / patterns[n][1] for n, mask in learned.items())
            changed, groups = changed + count * part.pop("changed"), groups + count
            record = _joined(record, part)
    for name, cut in cuts.items():
        if name not in masks or not learnable(session.view[name]):  # fused experts
            weight = session.view[name].tensor().abs().float()
            masks[name] = prior[name] if prior is not None else select(weight, cut, name).cpu()
            session.notes.append(f"'{name}' is no layer of its own: its mask was not learned")
    keep, group = next(iter(patterns.values()))
    memory = bytes_per_weight(
        keep, group, method.learning, method.optimizer, keep_best=method.keep_best,
        turns=method.turns,
    )  # fmt: skip
    return masks, {
        **record,
        "losses": _thinned(record["losses"]),
        "changed": changed / groups,
        "text": data.record,
        "batch": method.batch,
        "length": data.length,
        "turns": method.turns,
        "bytes_per_weight": memory,
    }


def _shares(session: Session, turns: int) -> list[list[str]]:
    """Names of the matrices of each turn: neighbouring blocks, front to back.

    Raises:
        UsageError: more turns than blocks.
    """
    blocks = session.view.blocks
    if turns > len(blocks):
        raise UsageError(
            f"there are {len(blocks)} blocks", field="turns", value=turns, fix="fewer turns"
        )
    ends = [len(blocks) * turn // turns for turn in range(turns + 1)]
    shares = [blocks[a:b] for a, b in pairwise(ends)]
    return [[m.name for block in share for m in block.matrices] for share in shares]


def _turn(
    session: Session,
    folder: RunFolder | None,
    patterns: Mapping[str, tuple[int, int]],
    prior: Mapping[str, Tensor],
    data: Windows,
    held: Windows,
    turn: int,
    names: list[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Learn the masks of ``names``, the others held under ``prior``; masks and record."""
    method, model = cast(MaskLLM, session.method), session.loaded.model
    learning = replace(method.learning, seed=method.seed + turn)
    steps = method.steps * (turn + 1) // method.turns - method.steps * turn // method.turns
    settings = replace(method.settings, steps=steps, seed=method.seed + turn)
    where = None if folder is None else folder.inner / "training"
    if where is not None and method.turns > 1:
        where = where / f"turn-{turn}"
    with LearnedMasks.attach(session.view, patterns, learning, prior, names) as masks:
        plain: Loss = next_token_loss
        if method.distil:
            plain = distillation_loss(masks.teacher(), method.distil, method.temperature)

        @torch.no_grad()
        def validate() -> float:
            """Loss under the mask as it would be exported: the only figure that counts."""
            total = 0.0
            with masks.settled():
                for ids, _ in held.batches(session.recipe.calibration.batch_tokens):
                    total += float(next_token_loss(model, Batch(ids.to(session.device)))) * len(ids)
            return total / len(held)

        start = validate()
        fitted = fit(
            model,
            data,
            settings,
            loss=masks.loss(plain),
            hooks=[masks],
            validate=validate,
            folder=where,
            identity={"method": session.recipe.options, "distil": method.distil, "turn": turn},
            progress=session.progress,
            label="learning masks" + (f" {turn + 1}/{method.turns}" if method.turns > 1 else ""),
        )
        moved = masks.moved
        return masks.detach(), {
            **fitted.record(),
            "losses": fitted.losses,
            "validations": [(0, start), *fitted.validations],
            "moved": moved,
            "changed": moved[-1][1] if moved else 0.0,
        }


def _joined(before: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The record of the turns so far and of one more."""
    if not before:
        return part
    steps = before["steps"]
    later = {
        key: [(steps + row[0], *row[1:]) for row in part[key]] for key in ("validations", "moved")
    }
    summed = {
        key: before[key] + part[key] for key in ("steps", "tokens", "trained", "seconds", "losses")
    }
    seconds = summed["seconds"]
    return {
        **part,
        **summed,
        **{key: before[key] + later[key] for key in later},
        "first_loss": before["first_loss"],
        "share": before["share"] + part["share"],
        "tokens_per_second": round(summed["tokens"] / seconds, 1) if seconds else None,
    }


def _data(session: Session, method: MaskLLM, text: Any) -> tuple[Windows, Windows]:
    """Windows to learn on, and a few set aside."""
    spec = session.recipe.calibration
    length = session.loaded.window(method.length or spec.length, "length")
    data = training_windows(
        spec.text if text is None else text,
        session.loaded.tokenizer,
        tokens=(method.steps + 1) * method.batch * length,
        length=length,
        seed=method.seed,
        vocabulary=session.loaded.vocabulary,
    )
    aside = min(max(1, round(HELD_OUT * len(data))), 64)
    if len(data) < 2:
        raise UsageError(
            "the text has one window; some are needed to train on and one to look at",
            field="calibration.text",
            value=spec.text,
            fix="a longer text, or a shorter length",
        )
    kept = Windows(data.ids[:-aside], None, data.record | {"held_out": aside})
    return kept, Windows(data.ids[-aside:], None, data.record)


def _thinned(values: list[float], most: int = 400) -> list[tuple[int, float]]:
    """(step, value), about ``most`` of them."""
    step = -(-len(values) // most) if values else 1
    return [(i + 1, values[i]) for i in range(0, len(values), step)]
