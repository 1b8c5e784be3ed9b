"""Replay against the model's own forward, for every family the anatomy knows."""

import pytest
import torch

from secateur.errors import NumericsError
from secateur.evidence.gather import gather_inputs
from secateur.evidence.gradients import (
    direct_gradients,
    gradients_by_block,
    of_matrix,
    sequence_loss,
)
from secateur.evidence.replay import Replay
from secateur.evidence.statistics import InputMoments
from secateur.evidence.store import EvidenceStore
from secateur.models.anatomy import ModelView
from secateur.models.tiny import FAMILIES, tiny_model


def windows(n=5, length=12, vocabulary=120, seed=0):
    return torch.randint(4, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


def left_padded(n=4, length=12):
    ids, mask = windows(n, length), torch.ones(n, length, dtype=torch.bool)
    for row in range(n):
        mask[row, :row] = False
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_gives_the_models_own_logits(family):
    model = tiny_model(family)
    ids = windows()
    replay = Replay(ModelView.of(model), ids, batch_size=2).start().to_end()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    got = torch.cat([replay.logits(b) for b in range(len(replay.hidden))])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert "forward" not in ModelView.of(model).blocks[0].module.__dict__


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_padding_is_passed_on(family):
    model = tiny_model(family)
    ids, mask = left_padded()
    replay = Replay(ModelView.of(model), ids, mask, batch_size=3).start().to_end()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    got = torch.cat([replay.logits(b) for b in range(len(replay.hidden))])
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_one_window_of_a_batch():
    model = tiny_model("llama")
    replay = Replay(ModelView.of(model), windows(), batch_size=3).start().to_end()
    torch.testing.assert_close(replay.logits_of(1, 1), replay.logits(1)[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_equal_what_a_full_forward_shows(family):
    model = tiny_model(family)
    view, ids = ModelView.of(model), windows()
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.module.register_forward_pre_hook(
            lambda _, args, name=m.name: seen.setdefault(name, []).append(args[0].detach())
        )
        for m in view.matrices()
        if m.index is None
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    replay = Replay(view, ids, batch_size=2).start()
    for block in view.blocks:
        found, replay.hidden = gather_inputs(replay, block, gram=True)
        for matrix in block.matrices:
            if matrix.index is not None:
                continue
            x = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen[matrix.name]])
            moments = found.moments[matrix.name]
            assert moments.tokens == len(x)
            torch.testing.assert_close(moments.gram, x.T @ x, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(moments.diagonal, x.square().sum(0), rtol=1e-3, atol=1e-3)


def test_linears_with_one_input_share_one_statistic():
    view = ModelView.of(tiny_model("llama"))
    replay = Replay(view, windows()).start()
    found, _ = gather_inputs(replay, view.blocks[0], gram=True)
    groups = [[n.rpartition(".")[2] for n in g] for g in found.order]
    assert groups == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    prefix = view.blocks[0].name
    assert (
        found.moments[f"{prefix}.self_attn.q_proj"] is found.moments[f"{prefix}.self_attn.v_proj"]
    )


def test_padded_tokens_do_not_count():
    """Excluding them equals running each sequence alone, without padding."""
    view = ModelView.of(tiny_model("llama"))
    ids, mask = left_padded()
    padded = Replay(view, ids, mask, batch_size=4).start()
    found, _ = gather_inputs(padded, view.blocks[0], gram=True)
    alone = {}
    for row in range(len(ids)):
        single = Replay(view, ids[row][mask[row]][None]).start()
        part, _ = gather_inputs(single, view.blocks[0], gram=True)
        for name, moments in part.moments.items():
            if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")):
                alone.setdefault(name, []).append(moments)
    for name, parts in alone.items():
        total = parts[0]
        for part in parts[1:]:
            total.merge(part)
        assert total.tokens == found.moments[name].tokens
        torch.testing.assert_close(found.moments[name].gram, total.gram, rtol=1e-3, atol=1e-3)


def test_experts_see_only_their_tokens():
    view = ModelView.of(tiny_model("mixtral"))
    replay = Replay(view, windows(), batch_size=2).start()
    found, _ = gather_inputs(replay, view.blocks[0], gram=False)
    experts = [m for m in found.moments if "experts" in m and "gate_up" in m]
    assert experts
    config = view.model.config
    routed = sum(found.moments[m].tokens for m in experts)
    assert routed == windows().numel() * config.num_experts_per_tok


@pytest.mark.parametrize("split", [1, 2, 5])
def test_moments_do_not_depend_on_the_batching(split):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    whole = InputMoments(6, gram=True)
    whole.update(x)
    parts = [InputMoments(6, gram=True) for _ in range(split)]
    for part, rows in zip(parts, x.chunk(split), strict=True):
        part.update(rows)
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    assert total.tokens == 40
    torch.testing.assert_close(total.second_moment(), whole.second_moment(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.mean_square(), x.square().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.mean(), x.mean(0), rtol=1e-5, atol=1e-6)


def test_broken_activations_name_the_block():
    model = tiny_model("llama")
    view = ModelView.of(model)
    with torch.no_grad():
        view.blocks[1].matrices[-1].tensor()[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=view.blocks[1].name):
        Replay(view, windows()).start().to_end()


def plain_gradients(model, ids, mask=None):
    """The sums by the book: one autograd call a sequence."""
    view = ModelView.of(model)
    keys = {m.key: m.stored for m in view.matrices()}
    for p in keys.values():
        p.requires_grad_(True)
    sums = {key: {"l1": 0.0, "l2": 0.0, "signed": 0.0} for key in keys}
    for row in range(len(ids)):
        extra = {} if mask is None else {"attention_mask": mask[row : row + 1].long()}
        logits = model(input_ids=ids[row : row + 1], use_cache=False, **extra).logits
        keep = None if mask is None else mask[row : row + 1]
        loss = sequence_loss(logits, ids[row : row + 1], keep)
        for key, g in zip(keys, torch.autograd.grad(loss, list(keys.values())), strict=True):
            sums[key]["l1"] += g.abs()
            sums[key]["l2"] += g.square()
            sums[key]["signed"] += g
    for p in keys.values():
        p.requires_grad_(False)
    return sums


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_gradient_sums_equal_autograd(family):
    model = tiny_model(family)
    ids = windows(3)
    expected = plain_gradients(model, ids)
    got = direct_gradients(ModelView.of(model), ids, None, ("l1", "l2", "signed"))
    assert all(p.grad is None for p in model.parameters())
    for key, sums in expected.items():
        assert got[key].samples == 3
        for norm in sums:
            torch.testing.assert_close(got[key].sums[norm], sums[norm], rtol=1e-3, atol=1e-6)
        assert (got[key].norm("l1") + 1e-6 >= got[key].norm("l2")).all()
        assert (got[key].norm("l2") * 3**0.5 + 1e-6 >= got[key].norm("signed")).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_block_by_block_gradients_equal_direct_ones(family, chunk, tmp_path):
    model = tiny_model(family)
    view, (ids, mask) = ModelView.of(model), left_padded(3)
    direct = direct_gradients(view, ids, mask, ("l1", "l2"))
    store = EvidenceStore(tmp_path, "gradients", {"k": chunk})
    replay = Replay(view, ids, mask, batch_size=1).start()
    gradients_by_block(
        replay, ("l1", "l2"), lambda b, sums: store.add_gradients(b.index, sums), chunk=chunk
    )
    for block in view.blocks:
        loaded = store.load_gradients(block.index)
        there = store.load_gradients(block.index, device="meta")
        assert all(t.is_meta for m in there.values() for t in m.sums.values())
        for matrix in block.matrices:
            ours, theirs = of_matrix(loaded, matrix), of_matrix(direct, matrix)
            assert ours.samples == theirs.samples == 3
            assert ours.norm("l1").shape == matrix.shape
            torch.testing.assert_close(ours.norm("l1"), theirs.norm("l1"), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(ours.norm("l2"), theirs.norm("l2"), rtol=1e-3, atol=1e-6)


def test_moments_survive_the_store_with_their_sharing(tmp_path):
    view = ModelView.of(tiny_model("llama"))
    replay = Replay(view, windows()).start()
    found, _ = gather_inputs(replay, view.blocks[0], gram=True)
    store = EvidenceStore(tmp_path, "gram", {"model": "x"})
    store.save_inputs(0, found.moments)
    loaded = store.load_inputs(0)
    assert loaded.keys() == found.moments.keys()
    prefix = view.blocks[0].name
    assert loaded[f"{prefix}.mlp.gate_proj"] is loaded[f"{prefix}.mlp.up_proj"]
    for name, moments in loaded.items():
        assert moments.tokens == found.moments[name].tokens
        assert torch.equal(moments.gram, found.moments[name].gram)
    assert not store.complete
    store.finish()
    assert EvidenceStore(tmp_path, "gram", {"model": "x"}).complete
    assert not EvidenceStore(tmp_path, "gram", {"model": "y"}).complete
