"""Zeroed and cut out are the same function, for every family, backend and kind of unit."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from structured_cases import DECODERS, MOE, OTHERS, inputs_of, model_of, outputs, random_mask

from secateur.models.surgery import apply_mask, shrink

CASES = [
    *[(f, ("head", "ffn"), "groups") for f in (*DECODERS, *OTHERS) if f not in (*MOE, "falcon")],
    ("falcon", ("head", "ffn"), "even"),
    *[(f, ("head",), "even") for f in ("llama", "falcon_gqa", "phi3", "qwen3", "phi", "mixtral")],
    *[(f, ("head",), "duplicate") for f in ("llama", "falcon_gqa", "phi3", "gemma2", "qwen3_moe")],
    ("qwen2_moe", ("ffn", "kv_group"), "groups"),
    *[(f, ("stem",), "groups") for f in DECODERS if f not in MOE],
    *[(f, ("stem",), "groups") for f in ("bert", "roberta", "t5", "t5_gated", "bart")],
    *[(f, ("layer",), "groups") for f in DECODERS],
    ("llama", ("head", "ffn", "stem", "layer"), "even"),
    ("gpt2", ("head", "ffn", "stem", "layer"), "even"),
]


NO_SDPA = ("bloom", "gemma2")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kinds", "gqa"), CASES)
def test_masked_is_shrunk(family: str, kinds: Any, gqa: str, attn: str) -> None:
    if attn == "sdpa" and family in NO_SDPA:
        pytest.skip("this family has no sdpa attention in transformers")
    model = model_of(family, attn)
    mask = random_mask(model, kinds, gqa)
    before = sum(p.numel() for p in model.parameters())
    masked = deepcopy(model)
    apply_mask(masked, mask)
    shrink(model, mask)
    assert sum(p.numel() for p in model.parameters()) < before
    for padded in (True, False):
        inputs = inputs_of(model, padded)
        expected, found = outputs(masked, **inputs), outputs(model, **inputs)
        if expected.shape != found.shape:  # hidden states, of a narrower residual stream
            expected = expected[..., mask.kept("stem")]
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
