"""How fast the pruned model is beside the dense one, on this machine, measured in turns.

Two models are timed one after the other, over and over until the time is spent, so that a
machine that slows down or speeds up does so for both. Reported are medians, quartiles, and
the ratio: times dense over times pruned, above 1 when the pruned model is faster.
"""

from __future__ import annotations

import inspect
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.masks.target import Target

DECODED = 4
"""Tokens generated one by one in each turn."""
FEWEST = 3
"""Turns, even when the time is spent before."""
NOTICEABLE = 0.05
"""Ratios nearer to 1 than this are called no difference."""


@torch.no_grad()
def compare_speed(
    dense: Any,
    pruned: Any,
    ids: Tensor,
    *,
    seconds: float = 8.0,
    target: Target | str | float | None = None,
) -> dict[str, Any]:
    """Tokens per second of two causal language models, reading and writing.

    Args:
        dense, pruned: called as ``model(input_ids=..., use_cache=True)``; each on its device.
        ids: (B, L), the prompt that is read (``prefill``) and continued (``decode``).
        seconds: about how long to measure; one turn each to warm up comes on top.
        target: what was pruned, for the verdict's wording.

    Returns:
        ``prefill`` and ``decode`` (None when the models keep no cache), each with
        tokens/s of both (median, quartiles) and their ``ratio`` (median, quartiles over
        turns); ``verdict`` in plain words; ``machine``; ``turns``.
    """
    models = {"dense": dense, "pruned": pruned}
    was_training = {name: model.training for name, model in models.items()}
    times: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in models}
    try:
        for model in models.values():
            model.eval()
            _turn(model, ids)
        deadline, turns = time.perf_counter() + seconds, 0
        while turns < FEWEST or time.perf_counter() < deadline:
            order = ("dense", "pruned") if turns % 2 == 0 else ("pruned", "dense")
            for name in order:
                read, write = _turn(models[name], ids)
                times[name]["prefill"].append(read)
                times[name]["decode"] += [] if write is None else [write]
            turns += 1
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    prefill = _summary(times, "prefill", ids.numel())
    decode = _summary(times, "decode", ids.shape[0]) if times["dense"]["decode"] else None
    return {
        "prefill": prefill,
        "decode": decode,
        "prompt": list(ids.shape),
        "turns": turns,
        "verdict": verdict(prefill, decode, target),
        "machine": machine(next(dense.parameters()).device),
    }


def verdict(
    prefill: dict[str, Any], decode: dict[str, Any] | None, target: Target | str | float | None
) -> str:
    """One or two honest sentences on what was measured."""
    asked = None if target is None else Target.parse(target)
    parts = [f"reading {change(prefill['ratio'])}"]
    if decode is not None:
        parts.append(f"writing {change(decode['ratio'])}")
    measured = ", ".join(parts)
    gained = any(_gain(part["ratio"]) > 0 for part in (prefill, decode) if part is not None)
    if gained or asked is None:
        return f"measured here: {measured}."
    if asked.is_pattern:
        return (
            f"measured here: {measured}. {asked} stored as a dense tensor gives no speed-up; "
            "2:4 does through torch.sparse on an NVIDIA GPU of compute capability 8.0 or newer."
        )
    return (
        f"measured here: {measured}. Unstructured {asked.sparsity:.0%} gives no speed-up with "
        "dense kernels: for speed remove whole structures, or prune 2:4 for an NVIDIA GPU that "
        "has it; for space use the bitmask export."
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    record: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
    return record


def _turn(model: Any, ids: Tensor) -> tuple[float, float | None]:
    """Seconds to read ``ids``, and seconds for each token written after it."""
    device = next(model.parameters()).device
    ids = ids.to(device)
    output, prefill = timed(lambda: model(input_ids=ids, use_cache=True), device)
    cache = cache_of(output)
    if cache is None:
        return prefill, None

    key = cache_name(model)

    def write() -> None:
        nonlocal cache
        token = output.logits[:, -1:].argmax(-1)
        for _ in range(DECODED):
            step = model(input_ids=token, use_cache=True, **{key: cache})
            token, cache = step.logits[:, -1:].argmax(-1), cache_of(step)

    _, decode = timed(write, device)
    return prefill, decode / DECODED


def cache_name(model: Any) -> str:
    """What the model's forward calls its cache: ``past_key_values`` before transformers 5.24."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in a model's output, under either name; None if it keeps none."""
    names = output if isinstance(output, Mapping) else vars(output)
    return names["cache"] if "cache" in names else getattr(output, "past_key_values", None)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What ``work`` gives, and the seconds it took on ``device``."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: dict[str, dict[str, list[float]]], part: str, tokens: int) -> dict[str, Any]:
    dense, pruned = (
        torch.tensor(times[name][part], dtype=torch.float64) for name in ("dense", "pruned")
    )
    return {
        "dense": quartiles(tokens / dense),
        "pruned": quartiles(tokens / pruned),
        "unit": "tokens/s",
        "ratio": quartiles(dense / pruned),
    }


def quartiles(values: Tensor) -> dict[str, float]:
    """``median``, ``low`` and ``high`` quartile of ``values`` (N,)."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
    low, middle, high = values.quantile(points).tolist()
    return {"median": middle, "low": low, "high": high}


def _gain(ratio: dict[str, float]) -> int:
    """1 faster, -1 slower, 0 no difference that the spread of the turns lets one claim."""
    if ratio["low"] > 1 and ratio["median"] > 1 + NOTICEABLE:
        return 1
    if ratio["high"] < 1 and ratio["median"] < 1 - NOTICEABLE:
        return -1
    return 0


def change(ratio: dict[str, float]) -> str:
    """A ratio of times, dense over pruned, in words."""
    words = {1: "faster", 0: "as fast as dense", -1: "slower"}[_gain(ratio)]
    return f"{words} ({ratio['median']:.2f}x, quartiles {ratio['low']:.2f}-{ratio['high']:.2f})"


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
