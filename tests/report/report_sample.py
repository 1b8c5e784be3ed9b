"""A made-up but plausible run of a 12-block model, for the pages' tests."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

ROLES = {
    "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
    "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
}  # fmt: skip


def sample_result(blocks: int = 12, **changes: Any) -> dict[str, Any]:
    """One ``result.json``; ``changes`` replace whole parts of it."""
    rng = np.random.default_rng(0)
    modules = [
        _module(rng, block, role, shape) for block in range(blocks) for role, shape in ROLES.items()
    ]
    zeros = sum(m["delivered_count"] for m in modules)
    result: dict[str, Any] = {
        "secateur": "0.1.0",
        "command": "secateur prune demo --method sparsegpt --sparsity 0.5 --out pruned",
        "recipe": {"model": "demo", "method": "sparsegpt", "sparsity": 0.5, "update": "obs"},
        "created": None,
        "model": {
            "name": "SmolLM2-135M-Instruct, de-quantised Q4_1",
            "parameters": 134515008,
            "fingerprint": "b179c9523d0e",
            "notes": ["the weights were quantised to 4 bits before, so many are equal"],
        },
        "modules": modules,
        "blocks": [
            {"index": i, "error": 0.012 * (i + 1) ** 0.8 + 0.004 * rng.random(), "seconds": 1.1}
            for i in range(blocks)
        ],
        "totals": {
            "asked": 0.5, "delivered": 0.5, "zeros": zeros, "elements": 2 * zeros, "pattern": None,
        },
        "quality": {
            "dense": {"perplexity": 19.83, "stderr": 0.42},
            "pruned": {"perplexity": 31.06, "stderr": 0.71},
            "kl": 0.412,
            "top1_agreement": 0.683,
            "protocol": {
                "dataset": "pydoc", "split": "test", "length": 512, "windows": 16,
                "tokens": 8176, "bos": False, "dtype": "float32", "digest": "3f9a1c07",
            },
        },
        "size": {
            "disk": {"dense": 269030016, "pruned": 269031200, "bitmask": 178201600},
            "memory": {"dense": 538060032, "pruned": 538060032},
        },
        "speed": {
            "prefill": {
                "dense": {"median": 431.0, "low": 410.0, "high": 446.0},
                "pruned": {"median": 428.0, "low": 402.0, "high": 449.0},
                "ratio": {"median": 0.99, "low": 0.93, "high": 1.06},
                "unit": "tokens/s",
            },
            "decode": {
                "dense": {"median": 21.2, "low": 20.1, "high": 22.0},
                "pruned": {"median": 21.4, "low": 20.2, "high": 22.1},
                "ratio": {"median": 1.01, "low": 0.95, "high": 1.07},
                "unit": "tokens/s",
            },
            "verdict": "No gain here: scattered zeros cost dense kernels as much as any weight.",
        },
        "timing": {"loading": 4.2, "calibration": 61.0, "solve": 74.5, "evaluation": 38.0},
        "memory_peak": 1730000000,
        "machine": {"processor": "AMD EPYC", "cores": 2, "threads": 2, "torch": "2.13.0"},
        "notes": ["the language model head is tied to the embedding and was left alone"],
        "verified": True,
    }  # fmt: skip
    return result | changes


def sample_comparison() -> dict[str, Any]:
    """One record of ``secateur compare``."""
    targets = ["0.5", "0.6", "0.7", "2:4"]
    curves = {
        "magnitude": [209.5, 812.0, 5310.0, 1651.0],
        "wanda": [37.84, 61.2, 190.4, 111.3],
        "sparsegpt": [34.31, 49.0, 118.0, 63.7],
        "sparsegpt+best": [30.12, 40.3, 82.1, 47.9],
    }
    table = {m: dict(zip(targets, v, strict=True)) for m, v in curves.items()}
    return {
        "methods": list(curves),
        "targets": targets,
        "perplexity": table,
        "stderr": {m: {t: v * 0.02 for t, v in row.items()} for m, row in table.items()},
        "kl": {m: {t: float(np.log(v / 19.0)) for t, v in row.items()} for m, row in table.items()},
        "top1_agreement": {m: {t: 13 / v for t, v in row.items()} for m, row in table.items()},
        "dense": 19.83,
        "protocol": {"dataset": "wikitext-2", "length": 512, "digest": "3f9a1c07"},
        "calibration": {"text": "pydoc", "samples": 64},
        "command": "secateur compare demo --methods magnitude,wanda,sparsegpt --sparsity 0.5,2:4",
        "model": "SmolLM2-135M-Instruct",
    }


def _module(
    rng: np.random.Generator, block: int, role: str, shape: tuple[int, int]
) -> dict[str, Any]:
    """A matrix with stripes: some inputs matter more, and in o and down some outputs too."""
    columns = rng.normal(0, 0.09, 64)
    columns[rng.integers(0, 64, 4)] -= 0.35
    rows = rng.normal(0, 0.05 if role in ("o", "down") else 0.01, 64)
    density = np.clip(0.5 + columns[None] + rows[:, None] + rng.normal(0, 0.05, (64, 64)), 0, 1)
    kept = np.exp(-((np.linspace(-4, 1, 40) - 0.2) ** 2) / 0.5)
    lost = np.exp(-((np.linspace(-4, 1, 40) + 1.2) ** 2) / 0.9)
    count = shape[0] * shape[1] // 2
    head = "self_attn" if role in "qkvo" else "mlp"
    return {
        "name": f"model.layers.{block}.{head}.{role}_proj",
        "block": block,
        "role": role,
        "shape": list(shape),
        "asked": 0.5,
        "asked_count": count,
        "delivered_count": count,
        "scope": "row",
        "update": "obs",
        "output_error": float(0.04 + 0.1 * rng.random() + 0.004 * block),
        "tokens": 32768,
        "histogram": {
            "edges": [round(float(e), 3) for e in np.linspace(-4, 1, 41)],
            "kept": [int(3000 * k * (i > 20)) for i, k in enumerate(kept)],
            "pruned": [int(3000 * k * (i <= 24)) for i, k in enumerate(lost)],
        },
        "threshold": 10**-0.9,
        "picture": {
            "rows": 64,
            "cols": 64,
            "density": base64.b64encode((density * 255).astype(np.uint8).tobytes()).decode(),
        },
        "row_sparsity": [0.5, 0.5, 0.5],
        "column_sparsity": [0.02, 0.49, 0.88],
        "seconds": 0.31,
        "notes": [],
    }
