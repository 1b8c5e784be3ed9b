"""The view of every family: blocks, matrices, roles, heads, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from secateur.errors import NumericsError, UsageError
from secateur.models.anatomy import Matrix, ModelView
from secateur.models.tiny import FAMILIES, tiny_model

SWIGLU = ["q", "k", "v", "o", "gate", "up", "down"]
PLAIN = ["q", "k", "v", "o", "fc1", "fc2"]
# transformers 5 fuses experts into 3-D parameters; 4 keeps three linears an expert.
EXPERT = ["gate_up", "down"] if transformers.__version__ >= "5" else ["gate", "up", "down"]
FUSED = ["qkv", "o", "fc1", "fc2"]
EXPECTED = {
    **dict.fromkeys(["llama", "smollm3", "mistral", "qwen2", "qwen3"], SWIGLU),
    **dict.fromkeys(["gemma", "gemma2", "gemma3"], SWIGLU),
    **dict.fromkeys(["opt", "phi"], PLAIN),
    **dict.fromkeys(["gpt2", "gpt_neox", "bloom", "falcon", "falcon_gqa"], FUSED),
    "phi3": ["qkv", "o", "gate_up", "down"],
    "mixtral": ["q", "k", "v", "o"] + 4 * EXPERT,
    "qwen3_moe": ["q", "k", "v", "o"] + 4 * EXPERT,
    "qwen2_moe": SWIGLU + 4 * EXPERT,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_in_a_block_is_found_once_with_its_role(family: str) -> None:
    model = tiny_model(family)
    view = ModelView.of(model)
    assert view.family is not None
    assert len(view.blocks) == 2
    for block in view.blocks:
        assert sorted(m.role for m in block.matrices) == sorted(EXPECTED[family])
    names = [m.name for m in view.matrices()]
    assert len(set(names)) == len(names)
    # Together with the routers they make up every parameter of more than one dimension.
    inside = {n for n, p in model.named_parameters() if n.startswith(view.path) and p.dim() > 1}
    routers = {f"{name}.weight" for name in view.excluded}
    assert {m.key for m in view.matrices()} | routers == inside


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_out_by_in_and_agree_with_the_head_counts(family: str) -> None:
    view = ModelView.of(tiny_model(family))
    heads, width = view.attention, view.hidden_size
    assert heads is not None
    assert width == 48
    q, kv = heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim
    rows = {"q": q, "k": kv, "v": kv, "qkv": q + 2 * kv, "o": width, "down": width, "fc2": width}
    for matrix in view.matrices():
        assert tuple(matrix.tensor().shape) == matrix.shape
        if matrix.role in rows:
            assert matrix.shape[0] == rows[matrix.role]
        if matrix.role not in ("o", "down", "fc2"):
            assert matrix.shape[1] == width
    assert view.mlp_width in (32, 96, 192, 64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_writing_changes_the_model_and_nothing_else(family: str, ids: torch.Tensor) -> None:
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    matrix = next(m for m in ModelView.of(model).matrices() if m.role in ("qkv", "down", "q"))
    new = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
    matrix.write(new)
    assert torch.equal(matrix.tensor(), new)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [matrix.key]
    if matrix.index is not None:
        others = torch.arange(len(before[matrix.key])) != matrix.index
        now = model.get_parameter(matrix.key)
        assert torch.equal(now[others], before[matrix.key][others])


def test_writing_casts_and_refuses_what_does_not_fit() -> None:
    layer = nn.Linear(3, 2).half()
    matrix = Matrix("x", layer)
    matrix.write(torch.full((2, 3), 1.5, dtype=torch.float64))
    assert layer.weight.dtype == torch.float16
    assert (layer.weight == 1.5).all()
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        matrix.write(torch.zeros(3, 2))
    with pytest.raises(NumericsError, match=r"'x'.*float16"):
        matrix.write(torch.full((2, 3), 1e6))
    assert (layer.weight == 1.5).all()


def test_a_conv1d_is_seen_transposed(ids: torch.Tensor) -> None:
    matrix = ModelView.of(tiny_model("gpt2"))["transformer.h.0.mlp.c_fc"]
    x = torch.randn(5, 48)
    bias: Any = matrix.module.bias
    assert torch.allclose(matrix.module(x), x @ matrix.tensor().T + bias, atol=1e-5)


def test_routers_are_left_out_with_the_reason() -> None:
    view = ModelView.of(tiny_model("qwen2_moe"))
    assert set(view.excluded) == {
        f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "shared_expert_gate")
    }
    with pytest.raises(UsageError, match="chooses the experts"):
        view["model.layers.0.mlp.gate"]


def test_include_and_exclude_are_shell_patterns() -> None:
    model = tiny_model("llama")
    view = ModelView.of(model, include=["*.mlp.*"], exclude=["*.0.*down*"])
    assert [m.name.rpartition(".")[2] for m in view.blocks[0].matrices] == ["gate_proj", "up_proj"]
    assert len(view.blocks[1].matrices) == 3
    assert view.excluded["model.layers.0.mlp.down_proj"] == "excluded by '*.0.*down*'"
    with pytest.raises(UsageError, match="exclude='lm_head'"):
        ModelView.of(model, exclude=["lm_head"])
    with pytest.raises(UsageError, match="nothing is left"):
        ModelView.of(model, exclude=["*"])
    with pytest.raises(UsageError, match=r"no matrix of that name.*\n.*such as model.layers.0"):
        view["model.layers.9.mlp.up_proj"]


def test_shared_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UsageError, match=r"layers.1.mlp.up_proj.weight' and 'model.layers.0"):
        ModelView.of(model)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UsageError, match="one and the same"):
        ModelView.of(model)


class _Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2)

    def merge(self) -> None: ...


def test_adapters_are_refused_with_the_way_out() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = _Lora(model.model.layers[0].mlp.up_proj)
    with pytest.raises(UsageError, match="merge_and_unload"):
        ModelView.of(model)


class _GptqLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 48, 96
        self.register_buffer("qweight", torch.zeros(6, 96, dtype=torch.int32))


def _eight_bit(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(48, 96, bias=False)
    layer.weight = nn.Parameter(torch.zeros(96, 48, dtype=dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "layer", [_GptqLinear(), _eight_bit(torch.int8), _eight_bit(torch.float8_e4m3fn)]
)
def test_quantised_linears_are_refused_with_the_way_out(layer: nn.Module) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = layer
    with pytest.raises(UsageError, match=r"layers.1.mlp.up_proj' is quantised.*\n.*dequantize"):
        ModelView.of(model)


def test_offloaded_models_are_refused(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = tiny_model("llama")
    cpu_offload(model)
    with pytest.raises(UsageError, match=r"offloaded(.|\n)*stream=True"):
        ModelView.of(model)


def test_attention_that_hides_its_inputs_is_left_out() -> None:
    layers = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)]
    view = ModelView.of(nn.Sequential(nn.ModuleList(layers)))
    assert [m.name for m in view.blocks[0].matrices] == ["0.0.linear1", "0.0.linear2"]
    assert "shows nobody" in view.excluded["0.1.self_attn.out_proj"]
