"""Saliency of units, what they weigh, which goes and when: the maths of EfficientLLM, in parts."""

import pydoc_data.topics

import numpy as np
import pytest
import torch
from efficient_cases import exact_llama, exact_loss, parameters, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from secateur.data.batches import Batch
from secateur.errors import NumericsError, UsageError
from secateur.masks.structured import StructuredMask
from secateur.models.loading import load
from secateur.models.surgery import shrink
from secateur.models.tiny import tiny_model
from secateur.models.units import parameters_of, unit_values, units_of
from secateur.training.group_saliency import SALIENCIES, SaliencySums, line_sums
from secateur.training.prune_schedule import PruneSchedule
from secateur.training.unit_choice import Chooser, Rules, smallest
from secateur.training.unit_ledger import UnitLedger

KINDS = ("head", "ffn", "stem")


def with_gradients(model, count=4):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    exact_loss(model, Batch(windows(count).ids)).backward()
    return model


def scored(model, kind, gqa="groups"):
    groups = units_of(model, KINDS, gqa).groups
    sums = SaliencySums(kind)
    sums.follow(groups, parameters_of(model))
    sums.add()
    return groups, sums.scores()


# -- saliency ------------------------------------------------------------------------------------


def brute(group, model, kind):
    """Element by element, a tied parameter once."""
    named, total = parameters_of(model), torch.zeros(group.n_units, dtype=torch.float64)
    for unit in range(group.n_units):
        seen, signed = {}, 0.0
        for part in group.slices:
            parameter = named[part.parameter]
            mask = seen.setdefault(id(parameter), (parameter, torch.zeros_like(parameter)))[1]
            mask.index_fill_(part.dim, part.index[unit], 1.0)
        for parameter, mask in seen.values():
            product = (parameter * parameter.grad * mask).detach().double()
            signed += float(product.sum())
            total[unit] += float(
                {"taylor1": product.abs().sum(), "obd": product.square().sum() / 2}.get(kind, 0.0)
            )
        if kind == "vector":
            total[unit] = abs(signed)
    return total


@pytest.mark.parametrize("kind", SALIENCIES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_group_scores_are_the_elements_sums(family, kind):
    """Rows and columns, biases, norms, a tied embedding, Conv1D and key-value groups."""
    model = with_gradients(tiny_model(family, tie_word_embeddings=True))
    groups, scores = scored(model, kind)
    for group in groups:
        if group.kind == "stem" or group.block == 0:
            wanted = brute(group, model, kind)
            assert torch.allclose(scores[group.key], wanted, rtol=2e-3, atol=1e-9), group.key


def test_slices_of_a_unit_are_aligned():
    """(G.4) What enters a product linearly has the same sum of w g on both sides of it."""
    model = with_gradients(exact_llama())
    layer = model.model.layers[0]

    def sums(module, dim):
        return line_sums(module.weight.detach(), module.weight.grad, "vector", [dim])[dim]

    close = {"rtol": 1e-4, "atol": 1e-8}
    assert torch.allclose(sums(layer.mlp.up_proj, 0), sums(layer.mlp.down_proj, 1), **close)
    attention = layer.self_attn
    assert torch.allclose(sums(attention.v_proj, 0), sums(attention.o_proj, 1), **close)
    q, k = (sums(m, 0).view(4, -1).sum(1) for m in (attention.q_proj, attention.k_proj))
    assert torch.allclose(q, k, **close)


def test_a_value_head_is_worth_what_its_query_heads_columns_are():
    """(G.4) With shared keys and values: v's rows of a head, o's columns of all that read it."""
    model = with_gradients(exact_llama(num_key_value_heads=2))
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    rows, columns = (
        line_sums(m.weight.detach(), m.weight.grad, "vector", [dim])[dim]
        for m, dim in ((attention.v_proj, 0), (attention.o_proj, 1))
    )
    read = columns.view(2, -1, size).sum(1).flatten()  # heads of a group lie side by side
    assert rows.abs().max() > 1e-6
    assert torch.allclose(rows, read, rtol=1e-4, atol=1e-9)


@torch.no_grad()
def true_damage(model, group, units, ids):
    """What the loss gains by each unit alone set to zero."""
    named, loss = parameters_of(model), lambda: float(model(ids, labels=ids).loss)
    before, out = loss(), []
    for unit in units:
        kept = [named[part.parameter].clone() for part in group.reads()]
        for part in group.reads():
            named[part.parameter].index_fill_(part.dim, part.index[unit], 0.0)
        out.append(loss() - before)
        for part, value in zip(group.reads(), kept, strict=True):
            named[part.parameter].copy_(value)
    return out


def test_saliency_ranks_true_damage_better_than_size():
    """(G.6) On a trained model, against removing each channel for real."""
    loaded = load("tiny")
    ids = loaded.tokenizer(pydoc_data.topics.topics["class"], return_tensors="pt").input_ids[
        :, :512
    ]
    ids = ids[:, : 4 * (ids.shape[1] // 4)].reshape(4, -1)
    model = loaded.model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    group = next(g for g in units_of(model, ("ffn",)).groups if g.block == 2)
    units = range(0, group.n_units, 8)
    damage = np.abs(true_damage(model, group, units, ids))
    size = unit_values(
        group, group.slices, {n: p.detach() ** 2 for n, p in parameters_of(model).items()}
    )
    ranks = {"size": spearmanr(size[::8], damage).statistic}
    for kind in ("taylor1", "obd"):
        _, scores = scored(model, kind)
        ranks[kind] = spearmanr(scores[group.key][::8], damage).statistic
    assert min(ranks["taylor1"], ranks["obd"]) > ranks["size"] + 0.05, ranks


def test_vector_score_is_the_slope_of_the_loss():
    """(G.5) Against central differences, the whole group scaled by 1 +- eps."""
    model = with_gradients(exact_llama())
    groups, scores = scored(model, "vector")
    batch, eps = Batch(windows(4).ids), 1e-4
    group = next(g for g in groups if g.kind == "ffn")
    named = parameters_of(model)
    for unit in (0, 7):

        def loss_at(factor, unit=unit):
            with torch.no_grad():
                for part in group.slices:
                    view = named[part.parameter].index_select(part.dim, part.index[unit])
                    named[part.parameter].index_copy_(part.dim, part.index[unit], view * factor)
                value = float(exact_loss(model, batch))
                for part in group.slices:
                    view = named[part.parameter].index_select(part.dim, part.index[unit])
                    named[part.parameter].index_copy_(part.dim, part.index[unit], view / factor)
            return value

        slope = (loss_at(1 + eps) - loss_at(1 - eps)) / (2 * eps)
        assert abs(slope) == pytest.approx(float(scores[group.key][unit]), rel=1e-3, abs=1e-8)


def test_a_key_value_group_is_its_own_heads():
    """(G.8) Query rows of other groups are no part of a unit."""
    model = with_gradients(exact_llama(num_key_value_heads=2))
    _, before = scored(model, "taylor1")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[24:] *= 3.0  # heads 2 and 3: group 1
    groups, after = scored(model, "taylor1")
    key = next(g.key for g in groups if g.kind == "kv_group")
    assert torch.equal(before[key][0], after[key][0])
    assert after[key][1] > before[key][1]


def test_averages():
    model = with_gradients(exact_llama())
    groups = units_of(model, ["ffn"]).groups
    mean, fading = SaliencySums("taylor1"), SaliencySums("taylor1", memory=0.5)
    for sums in (mean, fading):
        sums.follow(groups, parameters_of(model))
        sums.add()
    one = mean.scores()[groups[0].key]
    for parameter in model.parameters():
        parameter.grad *= 3
    for sums in (mean, fading):
        sums.add()
    assert torch.allclose(mean.scores()[groups[0].key], 2 * one, rtol=1e-5)
    assert torch.allclose(fading.scores()[groups[0].key], one * (0.5 + 3) / 1.5, rtol=1e-5)
    mean.restart()
    with pytest.raises(ValueError, match="no step"):
        mean.scores()


def test_infinite_saliency_is_named():
    model = with_gradients(exact_llama())
    model.model.layers[1].mlp.up_proj.weight.grad[0, 0] = torch.inf
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp"):
        scored(model, "taylor1")
    with pytest.raises(UsageError, match="saliency"):
        SaliencySums("third-order")


def test_half_precision_weights_count_in_float32():
    w = torch.full((2, 300), 1e-3, dtype=torch.bfloat16)
    g = torch.full_like(w, 1e-4)
    found = line_sums(w, g, "obd", [0, 1])
    assert found[0].dtype == torch.float32
    assert found[0][0] == pytest.approx(150 * (1e-7) ** 2, rel=0.05)


# -- what units weigh ----------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2), st.integers(0, 60), st.integers(0, 30), st.booleans())
def test_ledger_counts_what_surgery_leaves(heads, channels, width, tied):
    """(G.7) Parameters and FLOPs after any removal, against the closed form and the model itself."""
    from secateur.evaluation.flops import count_flops

    model = tiny_model("llama", num_key_value_heads=4, tie_word_embeddings=tied)
    groups = units_of(model, KINDS).groups
    ledger = UnitLedger(model, groups, 8.5)
    gone = {"head": heads, "ffn": channels, "stem": width}
    moves = {g.key: gone[g.kind] for g in groups}
    left = ledger.after(moves)
    mask = StructuredMask()
    for group in groups:
        units = torch.zeros(group.n_units, dtype=torch.bool)
        units[: moves[group.key]] = True
        mask.remove(group, units)
    shrink(model, mask)
    d, n, f, dim = 48 - width, 4 - heads, 96 - channels, 12
    formula = 264 * d * (1 if tied else 2) + 2 * (4 * d * n * dim + 3 * d * f) + 5 * d
    assert left.parameters == parameters(model) == formula
    assert left.flops == pytest.approx(count_flops(model, 16)["total"] / 16)
    ledger.take(moves)
    assert ledger.now() == left


# -- which goes ----------------------------------------------------------------------------------


def chooser(model, scores=None, **rules):
    groups = units_of(model, KINDS).groups
    scores = scores or {g.key: np.ones(g.n_units) for g in groups}
    gone = {g.key: np.zeros(g.n_units, dtype=bool) for g in groups}
    return Chooser(groups, scores, gone, UnitLedger(model, groups), Rules(**rules)), groups


def test_equal_scores_take_the_lowest_number():
    """(G.12)"""
    work, _ = chooser(tiny_model("llama", num_key_value_heads=4), normalize="raw")
    choice = work.choose(0)
    assert choice.type == "stem"  # one unit, not one a layer: the smallest raw sum
    assert choice.units == {"stem": [0]}
    assert work.choose(0).units == {"stem": [1]}


def test_a_type_whose_scores_grow_is_never_pruned_more():
    """(G.12)"""
    model = tiny_model("llama", num_key_value_heads=4)
    generator = np.random.default_rng(0)
    groups = units_of(model, KINDS).groups
    base = {g.key: generator.random(g.n_units) + 0.1 for g in groups}
    counts = []
    for factor in (0.02, 0.1, 1.0):
        scores = {k: v * (factor if "mlp" in k else 1.0) for k, v in base.items()}
        work, _ = chooser(model, scores)
        budget = int(0.6 * parameters(model))
        kinds = []
        while not work.settled(budget):
            kinds.append(work.choose(budget).type)
        counts.append(kinds.count("ffn"))
        assert work.ledger.now().parameters <= budget
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_uniform_keeps_layers_alike_and_global_need_not():
    """(G.11)"""
    model = tiny_model("llama", num_key_value_heads=4)
    groups = units_of(model, KINDS).groups
    scores = {g.key: np.full(g.n_units, 5.0 if g.block == 1 else 1.0) for g in groups}
    budget = int(0.7 * parameters(model))
    left = {}
    for mode in ("uniform", "global"):
        work, _ = chooser(model, {k: v.copy() for k, v in scores.items()}, layer_mode=mode)
        while not work.settled(budget):
            work.choose(budget)
        left[mode] = [work.left[g.key] for g in groups if g.kind == "ffn"]
    assert len(set(left["uniform"])) == 1
    assert left["global"][0] < left["global"][1]


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_budget_is_met_by_less_than_a_unit(round_to, share):
    """(G.11) A head is many channels: it goes only where it fits."""
    model = tiny_model("llama", num_key_value_heads=4)
    generator = np.random.default_rng(3)
    groups = units_of(model, KINDS).groups
    scores = {g.key: generator.random(g.n_units) for g in groups}
    work, _ = chooser(model, scores, round_to=round_to)
    budget = int(share * parameters(model))
    while not work.settled(budget):
        assert work.choose(budget) is not None
    now = work.ledger.now().parameters
    assert now <= budget
    if round_to == 1:
        least = min(
            now - work.ledger.after({g.key: 1 for g in groups if g.kind == kind}).parameters
            for kind in ("ffn", "stem")
        )
        assert now > budget - 2 * least
    else:
        widths = [work.left[g.key] for g in groups if g.kind != "head"]
        assert all(w % 8 == 0 for w in widths), widths


def test_least_shapes_hold():
    model = tiny_model("llama", num_key_value_heads=4)
    rules = {"min_heads": 3, "min_ffn": 90, "min_width": 40}
    work, groups = chooser(model, **rules)
    while work.choose(0) is not None:
        pass
    assert {g.kind: work.left[g.key] for g in groups} == {"head": 3, "ffn": 90, "stem": 40}
    ledger = UnitLedger(model, groups)
    assert smallest(groups, ledger, Rules(**rules)) == work.ledger.now().parameters


def test_even_heads_go_one_from_each_group():
    model = tiny_model("llama")  # 4 query heads on 2 key-value heads
    groups = units_of(model, KINDS, "even").groups
    heads = [g for g in groups if g.kind == "head"]
    scores = {g.key: np.full(g.n_units, 1e6) for g in groups}
    for group in heads:
        scores[group.key] = np.array([3.0, 1.0, 2.0, 4.0])
    gone = {g.key: np.zeros(g.n_units, dtype=bool) for g in groups}
    work = Chooser(groups, scores, gone, UnitLedger(model, groups), Rules())
    choice = work.choose(0)
    assert choice.type == "head"
    assert set(map(tuple, choice.units.values())) == {(1, 2)}
    assert all(work._lowest(g) is None for g in heads)  # the last of each group stays


def test_cost_is_flops_or_what_the_caller_measured():
    model = tiny_model("llama", num_key_value_heads=4)
    by_flops, _ = chooser(model, normalize="cost")
    measured, _ = chooser(model, normalize="cost", costs={"head": 1e9, "ffn": 1.0, "stem": 1.0})
    assert by_flops.choose(0).type in KINDS
    assert measured.choose(0).type == "head"


@pytest.mark.parametrize(
    "change", [{"normalize": "area"}, {"layer_mode": "some"}, {"min_ffn": 0}, {"round_to": 0},
               {"costs": {"ffn": -1.0}}],
)  # fmt: skip
def test_rules_name_what_is_wrong(change):
    with pytest.raises(UsageError) as caught:
        Rules(**change)
    assert caught.value.field == next(iter(change))


# -- when ----------------------------------------------------------------------------------------


def test_the_line_ends_at_the_budget_and_events_keep_their_distance():
    schedule = PruneSchedule(start=10, stop=51, every=7)
    due = [s for s in range(200) if schedule.due(s)]
    assert due == [17, 24, 31, 38, 45, 51]
    sizes = [schedule.allowed(s, 1000, 400) for s in range(60)]
    assert sizes[:11] == [1000] * 11
    assert sizes[51:] == [400] * 9
    assert sizes == sorted(sizes, reverse=True)
    assert [PruneSchedule("every_n_batches", 2, 9, 3).channels(s) for s in (2, 5, 8)] == [0, 1, 2]


@pytest.mark.parametrize("change", [{"start": 0}, {"stop": 1}, {"every": 0}, {"pace": "slow"}])
def test_schedules_name_what_is_wrong(change):
    with pytest.raises(UsageError):
        PruneSchedule(**{"start": 1, "stop": 10, **change})
