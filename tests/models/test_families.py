"""Rows of fused matrices, against what attention is really given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.models.anatomy import ModelView, capture_inputs
from secateur.models.families import Attention, ends_with, qkv_rows
from secateur.models.tiny import tiny_model

FUSED = ["gpt2", "gpt_neox", "bloom", "falcon", "falcon_gqa", "phi3"]


class _AttentionInputs(TorchFunctionMode):
    """Records the first query, key and value that attention gets, each (heads, head_dim)
    at position 0 of the first sequence, where rotary embeddings are the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.seen and func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            self.seen = {name[0]: named[name][0, :, 0] for name in ("query", "key", "value")}
        if not self.seen and func is Tensor.baddbmm:  # BLOOM's own: (B * heads, length, dim)
            named = kwargs or {}
            self.seen = {"q": named["batch1"][:4, 0], "k": named["batch2"][:4, :, 0]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FUSED)
def test_rows_of_a_fused_matrix_are_those_attention_uses(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    if family == "bloom":
        ids = ids[:1]
    view = ModelView.of(model)
    assert view.family is not None
    assert view.family.qkv is not None
    assert view.attention is not None
    matrix = next(m for m in view.matrices() if m.role == "qkv")
    inputs: list[Tensor] = []
    spy = _AttentionInputs()
    with torch.no_grad(), capture_inputs([matrix], lambda _, x: inputs.append(x)), spy:
        model(ids)
    bias: Any = matrix.module.bias
    out = inputs[0][0, 0] @ matrix.tensor().T + (0 if bias is None else bias.detach())
    rows = qkv_rows(view.family.qkv, view.attention)
    assert spy.seen
    for part, seen in spy.seen.items():
        ours = out[rows[part]]
        repeated = ours.repeat_interleave(len(seen) // len(ours), 0)
        assert torch.allclose(repeated, seen, atol=1e-5), part


def test_rows_partition_the_matrix() -> None:
    for layout in ("stacked", "grouped"):
        rows = qkv_rows(layout, Attention(6, 2, 5))  # type: ignore[arg-type]
        together = torch.cat([part.reshape(-1) for part in rows.values()])
        assert torch.equal(together.sort().values, torch.arange((6 + 4) * 5))


def test_suffixes_match_whole_words_only() -> None:
    assert ends_with("a.mlp.gate", "mlp.gate")
    assert not ends_with("a.mlp.gate_proj", "mlp.gate")
    assert not ends_with("a.xmlp.gate", "mlp.gate")
