"""Units: closed-form parameter counts of published models, and scores that fold correctly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from structured_cases import model_of

from secateur.evaluation.flops import count_flops
from secateur.masks.structured import StructuredMask
from secateur.models.surgery import apply_mask, shrink
from secateur.models.unit_search import layout_of
from secateur.models.units import unit_values, units_of


def on_meta(**config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config))


LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def cut(model: Any, share: Any, layers: range | None = None, kinds: Any = ("head", "ffn")) -> None:
    mask = StructuredMask()
    for group in units_of(model, kinds):
        if group.block is None or layers is None or group.block in layers:
            gone = torch.zeros(group.n_units, dtype=torch.bool)
            gone[: round(group.n_units * share(group))] = True
            mask.remove(group, gone)
    shrink(model, mask)


@pytest.mark.parametrize(
    ("config", "layers", "dense", "pruned"),
    [
        (LLAMA_7B, range(4, 30), 6_738_415_616, 5_422_977_024),
        (LLAMA3_8B, range(4, 30), 8_030_261_248, 6_612_586_496),
        (TINYLLAMA, range(4, 18), 1_100_048_384, 945_907_712),
    ],
)
def test_published_counts_of_llm_pruner(
    config: Any, layers: range, dense: int, pruned: int
) -> None:
    """25 % of the units of these layers, as its README counts them (spec 02, B.2)."""
    model = on_meta(**config)
    assert count(model) == dense
    cut(model, lambda group: 0.25, layers)
    assert count(model) == pruned


def test_published_count_of_slimgpt() -> None:
    """Ratios 0.0625 to 0.25 growing with the logarithm of depth: its 5.4 B of LLaMA-7B."""
    model = on_meta(**LLAMA_7B)
    cut(model, lambda g: 0.0625 + 0.1875 * math.log(g.block + 1) / math.log(32))
    assert count(model) == pytest.approx(5.439e9, rel=2e-4)


def test_formula_of_a_narrower_llama() -> None:
    """EfficientLLM's 0.45 B out of 1.7 B: 19 heads, 3020 channels, width 1183, tied."""
    model = on_meta(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        tie_word_embeddings=True,
    )
    assert count(model) == 1_711_376_384
    left = {"head": 19, "ffn": 3020, "stem": 1183}
    cut(model, lambda g: 1 - left[g.kind] / g.n_units, kinds=("head", "ffn", "stem"))
    d, heads, f, v, layers = 1183, 19, 3020, 49152, 24
    expected = v * d + layers * (4 * d * heads * 64 + 3 * d * f) + (2 * layers + 1) * d
    assert count(model) == expected == pytest.approx(0.453e9, rel=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon_gqa", "bloom", "bert", "t5"])
def test_a_unit_costs_what_its_removal_saves(family: str) -> None:
    for kinds in (("head", "ffn"), ("stem",)):
        model = model_of(family, "eager")
        before, flops = count(model), count_flops(model, 1)
        expected, work = 0, 0.0
        mask = StructuredMask()
        for group in units_of(model, kinds):
            gone = torch.zeros(group.n_units, dtype=torch.bool)
            gone[0] = True
            mask.remove(group, gone)
            expected += group.parameters
            work += group.flops(1)
        shrink(model, mask)
        if family == "t5" and "head" in kinds:  # head 0's column of both bias tables goes, too
            expected += 2 * 32
        assert before - count(model) == expected
        if family not in ("t5", "bert"):
            assert flops["total"] - count_flops(model, 1)["total"] == pytest.approx(work)


def test_scores_of_a_group_do_not_see_other_groups() -> None:
    """Scaling the query heads of one key-value group changes that group's score alone (G.8)."""
    model = model_of("llama")
    (group, *_rest) = units_of(model, ("kv_group",))

    def scores() -> torch.Tensor:
        values = {n: p.detach().square() for n, p in model.named_parameters()}
        return unit_values(group, group.slices, values)

    before = scores()
    at = layout_of(model).attentions[0]
    with torch.no_grad():
        model.get_submodule(at.names["q"]).weight[: 2 * at.head_dim] *= 3.0  # heads 0 and 1
    after = scores()
    assert after[0] > before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon_gqa", "phi3", "bloom"])
def test_slices_of_a_unit_are_all_it_has(family: str) -> None:
    """A unit whose reader columns alone are zero computes what a wholly zeroed one does."""
    from structured_cases import inputs_of, outputs

    model, other = model_of(family, "eager"), model_of(family, "eager")
    mask = StructuredMask()
    for group in units_of(model, ("head", "ffn")):
        gone = torch.zeros(group.n_units, dtype=torch.bool)
        gone[-1] = True
        mask.remove(group, gone)
        for part in group.reads():
            tensor = dict(other.named_parameters())[part.parameter]
            with torch.no_grad():
                tensor.index_fill_(part.dim, part.index[gone].reshape(-1), 0.0)
    apply_mask(model, mask)
    inputs = inputs_of(model)
    torch.testing.assert_close(outputs(model, **inputs), outputs(other, **inputs))


def test_by_type_in_an_encoder_decoder() -> None:
    for family in ("t5", "bart"):
        groups = units_of(model_of(family), ("head",))
        kinds = {(g.stack, g.attention) for g in groups}
        assert kinds == {("encoder", "self"), ("decoder", "self"), ("decoder", "cross")}
