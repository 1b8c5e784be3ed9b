"""Finding the list of blocks where no row of the table says where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AutoModel, BertConfig, T5Config

from secateur.errors import UsageError
from secateur.models.anatomy import ModelView
from secateur.models.discovery import candidates
from secateur.models.saving import block_state, outside_state


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x))
        return out


class _Homemade(nn.Module):
    def __init__(self, **lists: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(9)])
        for name, length in lists.items():
            self.add_module(name, nn.Sequential(*[_Layer(8) for _ in range(length)]))


def test_the_one_list_of_blocks_is_found() -> None:
    view = ModelView.of(_Homemade(stack=3))
    assert view.path == "stack"
    assert view.family is None
    assert view.attention is None
    assert [b.name for b in view.blocks] == ["stack.0", "stack.1", "stack.2"]
    assert [m.name for m in view.blocks[0].matrices] == [
        "stack.0.up",
        "stack.0.down",
        "stack.0.parts.0.0",
    ]


def test_a_list_that_holds_nearly_everything_wins() -> None:
    assert ModelView.of(_Homemade(big=9, small=1)).path == "big"


def test_two_lists_of_like_size_are_a_question_for_the_user() -> None:
    model = _Homemade(left=3, right=2)
    with pytest.raises(UsageError, match=r"left \(3 x _Layer\), right \(2 x _Layer\)"):
        ModelView.of(model)
    assert ModelView.of(model, blocks="right").path == "right"


def test_a_wrong_override_names_the_candidates() -> None:
    model = _Homemade(stack=3)
    with pytest.raises(UsageError, match=r"blocks='stuck'.*no module.*\n.*stack \(3 x _Layer\)"):
        ModelView.of(model, blocks="stuck")
    with pytest.raises(UsageError, match="a _Layer, not a list"):
        ModelView.of(model, blocks="stack.0")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no list of blocks.*\n.*none found"):
        ModelView.of(nn.Linear(3, 3))


def _auto(config: Any) -> Any:
    return AutoModel.from_config(config)


def test_an_encoder_decoder_asks_which() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64)
    model = _auto(config)
    with pytest.raises(UsageError, match=r"encoder-decoder.*\n.*encoder.block \(2 x T5Block\)"):
        ModelView.of(model)
    assert len(ModelView.of(model, blocks="decoder.block").matrices()) == 2 * 10


def test_an_unknown_encoder_is_found_with_generic_roles() -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    view = ModelView.of(_auto(config))
    assert view.path == "encoder.layer"
    assert len(view.blocks) == 3
    assert [m.role for m in view.blocks[0].matrices][:3] == ["q", "k", "v"]


def test_a_model_that_repeats_one_block_is_refused() -> None:
    config = AlbertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(UsageError, match="same weights"):
        ModelView.of(_auto(config))


class _OtherLayer(_Layer): ...


def test_a_hybrid_of_several_kinds_of_layer_is_one_list() -> None:
    model = nn.Module()
    model.stack = nn.ModuleList([_Layer(8), _OtherLayer(8), _Layer(8)])
    assert len(ModelView.of(model).blocks) == 3


def test_a_model_that_is_nothing_but_blocks() -> None:
    view = ModelView.of(nn.Sequential(_Layer(8), _Layer(8)))
    assert [b.name for b in view.blocks] == ["0", "1"]
    assert view.matrices()[0].name == "0.up"
    assert outside_state(view) == {}
    assert set(block_state(view, view.blocks[1])) == {
        f"1.{name}.{kind}" for name in ("up", "down", "parts.0.0") for kind in ("weight", "bias")
    }


def test_inner_lists_are_not_candidates() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([_Homemade(experts=4) for _ in range(2)])
    assert list(candidates(model)) == ["layers"]
    assert torch.is_tensor(next(model.parameters()))
