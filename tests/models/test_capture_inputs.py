"""What is captured must be what each matrix really multiplies."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from secateur.models.anatomy import Matrix, ModelView, capture_inputs
from secateur.models.capture import eager_experts
from secateur.models.tiny import FAMILIES, tiny_model

fused = pytest.mark.skipif(transformers.__version__ < "5", reason="experts are linears there")
MOE = ["mixtral", "qwen3_moe", "qwen2_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_reported_with_its_own_inputs(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    view = ModelView.of(model)
    linears = [m for m in view.matrices() if m.index is None]
    hooked: dict[str, Tensor] = {}
    handles = [
        m.module.register_forward_pre_hook(lambda _, args, m=m: hooked.update({m.name: args[0]}))
        for m in linears
    ]
    captured: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        dense = model(ids).logits
        hooked.clear()
        with capture_inputs(view.matrices(), lambda m, x: captured[m.name].append(x)):
            watched = model(ids).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(dense, watched, atol=1e-5)
    for matrix in linears:
        assert [id(x) for x in captured[matrix.name]] == [id(hooked[matrix.name])]
        assert captured[matrix.name][0].shape[-1] == matrix.shape[1]
        if ".experts." not in matrix.name:  # all tokens, flattened (OPT) or not
            assert captured[matrix.name][0].numel() == ids.numel() * matrix.shape[1]
    assert not any(m.module._forward_pre_hooks for m in view.matrices())


def test_linears_that_share_an_input_get_the_same_object(ids: Tensor) -> None:
    model = tiny_model("llama")
    block = ModelView.of(model).blocks[0]
    groups: dict[int, list[str]] = defaultdict(list)
    keep: list[Tensor] = []

    def note(matrix: Matrix, inputs: Tensor) -> None:
        keep.append(inputs)
        groups[id(inputs)].append(matrix.role)

    with torch.no_grad(), capture_inputs(block.matrices, note):
        model(ids)
    assert list(groups.values()) == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


@fused
@pytest.mark.parametrize("family", MOE)
def test_experts_see_just_the_tokens_routed_to_them(family: str, ids: Tensor) -> None:
    """Oracle: the router's choice, and the expert's formula, worked out by hand."""
    model = tiny_model(family)
    view = ModelView.of(model)
    experts: Any = model.model.layers[0].mlp.experts
    calls: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    got: dict[str, tuple[Tensor, Tensor]] = {}

    def note(matrix: Matrix, inputs: Tensor) -> None:
        assert capture.rows is not None
        got[matrix.name] = (inputs, capture.rows)

    mine = [m for m in view.blocks[0].matrices if m.index is not None]
    with torch.no_grad(), capture_inputs(mine, note) as capture:
        model(ids)
    handle.remove()
    hidden, chosen = calls[0][:2]
    for expert in range(4):
        rows = (chosen == expert).any(-1).nonzero().flatten()
        stem = "model.layers.0.mlp.experts"
        if not len(rows):
            assert f"{stem}.gate_up_proj.{expert}" not in got
            continue
        inputs, seen = got[f"{stem}.gate_up_proj.{expert}"]
        assert torch.equal(seen.sort().values, rows)
        assert torch.equal(inputs, hidden[seen])
        gate, up = (inputs @ experts.gate_up_proj[expert].T).chunk(2, -1)
        middle, again = got[f"{stem}.down_proj.{expert}"]
        assert torch.equal(again, seen)
        assert torch.allclose(middle, experts.act_fn(gate) * up, atol=1e-5)


@fused
def test_experts_are_captured_in_a_backward_pass_too(ids: Tensor) -> None:
    model = tiny_model("mixtral")
    view = ModelView.of(model)
    seen: list[str] = []
    with capture_inputs(view.matrices(), lambda m, x: seen.append(m.name)):
        model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad is not None
    assert sum("experts" in name for name in seen) > 8


@fused
def test_everything_is_as_before_after_an_exception(ids: Tensor) -> None:
    model = tiny_model("mixtral")
    view = ModelView.of(model)
    before = model.config._experts_implementation

    class Boom(Exception): ...

    def explode(matrix: Matrix, inputs: Tensor) -> None:
        if matrix.index is not None:
            assert model.config._experts_implementation == "eager"
            raise Boom

    with pytest.raises(Boom), torch.no_grad(), capture_inputs(view.matrices(), explode):
        model(ids)
    assert model.config._experts_implementation == before
    assert not any(m.module._forward_pre_hooks for m in view.matrices())
    assert torch.overrides._get_current_function_mode() is None


def test_eager_experts_ignores_modules_without_a_choice() -> None:
    with eager_experts([torch.nn.Linear(2, 2)]):
        pass


@fused
def test_transposed_experts_are_seen_through_matmul(ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=264,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    view = ModelView.of(model)
    seen: dict[str, tuple[int, ...]] = {}
    with (
        torch.no_grad(),
        capture_inputs(view.matrices(), lambda m, x: seen.update({m.name: x.shape})),
    ):
        model(ids)
    for matrix in view.matrices():
        if matrix.name in seen:
            assert seen[matrix.name][-1] == matrix.shape[1]
    tokens = sum(shape[0] for name, shape in seen.items() if "gate_up_proj" in name)
    assert tokens == 2 * ids.numel()


@fused
def test_experts_multiplied_all_at_once_report_their_own_tokens(ids: Tensor) -> None:
    """Llama 4 hands every expert all tokens, most of them zeroed; one expert a token counts."""
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=264,
        hidden_size=48,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        pad_token_id=0,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    view = ModelView.of(model)
    rows: dict[str, list[Tensor]] = defaultdict(list)

    def note(matrix: Matrix, inputs: Tensor) -> None:
        assert inputs.shape[-1] == matrix.shape[1]
        if matrix.index is not None:
            assert capture.rows is not None
            assert inputs.ne(0).any(-1).all()
            rows[matrix.name.split(".")[-2]].append(capture.rows)

    with torch.no_grad(), capture_inputs(view.matrices(), note) as capture:
        model(ids)
    for seen in rows.values():
        assert torch.equal(torch.cat(seen).sort().values, torch.arange(ids.numel()))
    assert set(rows) == {"gate_up_proj", "down_proj"}
