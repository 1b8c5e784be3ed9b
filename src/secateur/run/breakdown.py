"""Where the time goes: seconds of each part of a model, dense and pruned side by side."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evaluation.flops import count_flops
from secateur.evaluation.speed import cache_name, cache_of
from secateur.models.discovery import is_linear
from secateur.models.unit_search import layout_of

PARTS = ("projections", "ffn", "head", "rest")
_DECODED = 4


@torch.no_grad()
def breakdown(
    dense: Any,
    pruned: Any,
    ids: Tensor,
    turns: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Median seconds of the linears of attention, of the MLPs, of the head, and of all the rest.

    ``rest`` is attention itself (scores, softmax), norms, embeddings and the interpreter's own
    work: it does not shrink with the widths, which is why a cut saves less time than FLOPs.

    Returns:
        ``prefill`` and ``decode``: for each the seconds by part, dense and pruned; the
        speed-up, the FLOPs ratio, and how much of it was reached.
    """
    found: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        times: dict[str, list[dict[str, float]]] = {"dense": [], "pruned": []}
        for _ in range(turns):
            for name, model in (("dense", dense), ("pruned", pruned)):
                times[name].append(_timed(model, ids, phase == "decode", clock))
        middle = {
            name: {part: median(t[part] for t in runs) for part in (*PARTS, "total")}
            for name, runs in times.items()
        }
        tokens = ids.shape[1]
        before = count_flops(dense, tokens, decode=phase == "decode")["total"]
        after = count_flops(pruned, tokens, decode=phase == "decode")["total"]
        gained = middle["dense"]["total"] / middle["pruned"]["total"]
        found[phase] = {
            **middle,
            "speed_up": gained,
            "flops_ratio": before / after,
            "reached": gained / (before / after),
        }
    return found


def _timed(model: Any, ids: Tensor, decode: bool, clock: Callable[[], float]) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    ids = ids.to(next(model.parameters()).device)
    cache: Any = None
    if decode:
        output = model(input_ids=ids, use_cache=True)
        cache, token = cache_of(output), output.logits[:, -1:].argmax(-1)
    key = cache_name(model)
    with _watched(model, spent, clock):
        start = clock()
        if decode:
            for _ in range(_DECODED):
                step = model(input_ids=token, use_cache=True, **{key: cache})
                token, cache = step.logits[:, -1:].argmax(-1), cache_of(step)
        else:
            model(input_ids=ids, use_cache=True)
        total = clock() - start
    count = _DECODED if decode else 1
    out = {part: spent[part] / count for part in PARTS[:-1]}
    return out | {"rest": total / count - sum(out.values()), "total": total / count}


@contextmanager
def _watched(
    model: nn.Module, spent: dict[str, float], clock: Callable[[], float]
) -> Iterator[None]:
    layout = layout_of(model)
    attention = {n for a in layout.attentions for n in a.names.values()}
    ffn = {n for m in layout.mlps for n in m.names.values()}
    handles = []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        part = "projections" if name in attention else "ffn" if name in ffn else "head"
        started: list[float] = []

        def before(_: Any, __: Any, started: list[float] = started) -> None:
            started.append(clock())

        def after(
            _: Any, __: Any, ___: Any, part: str = part, started: list[float] = started
        ) -> None:
            spent[part] += clock() - started.pop()

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
