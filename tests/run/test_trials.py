"""Trials: a plan's value as if the model were pruned, with its weights never touched."""

import math

import pytest
import torch

import secateur
from secateur.allocation import allocators
from secateur.data.windows import Windows, calibration_windows
from secateur.errors import UsageError
from secateur.masks.selection import select
from secateur.recipe import Recipe
from secateur.run.planning import problem_of
from secateur.run.session import prepare
from secateur.run.trial_of import Trial, search_windows, sorted_scores
from secateur.run.trials import Trials
from secateur.run.trials_store import OpenTrials, read_rankings, write_trials


def session_of(model="tiny", **changes):
    recipe = {
        "model": str(model),
        "sparsity": 0.6,
        "calibration": {"samples": 4, "length": 32},
        "search": {"samples": 4},
        "evaluation": None,
    }
    return prepare(Recipe.build({**recipe, **changes}))


def plans(session, names=("uniform", "incremental")):
    made = [allocators[n].with_options({}) for n in names]
    problem = problem_of(session, made)
    return problem, [a.plan(problem) for a in made]


def trials_of(session, problem, windows, rungs, **settings):
    rankings, _ = sorted_scores(session, problem.scores)
    return Trials(session.view, rankings, windows, session.recipe.target, rungs=rungs, **settings)


def weights(session):
    return {m.name: m.tensor().clone() for m in session.view.matrices()}


def pruned_by_hand(session, problem, plan):
    """The model's weights under a plan, masks chosen anew."""
    return {
        name: m.masked_fill(select(score, plan.cut(name, session.scope)), 0)
        for (name, score), m in zip(
            problem.scores(), (w.tensor() for w in session.view.matrices()), strict=True
        )
    }


def by_hand(session, windows, new, fitness):
    """The same value from the whole model's own forward."""
    model, ids = session.loaded.model, windows.ids
    mask = None if windows.mask is None else windows.mask
    keep = (
        torch.ones_like(ids[:, 1:], dtype=torch.bool)
        if mask is None
        else mask[:, 1:] & mask[:, :-1]
    )
    more = {} if mask is None else {"attention_mask": mask.long()}
    with torch.no_grad():
        dense = model(input_ids=ids, **more).logits[:, :-1][keep].double().log_softmax(-1)
        before = weights(session)
        for m in session.view.matrices():
            m.write(new[m.name])
        pruned = model(input_ids=ids, **more).logits[:, :-1][keep].double().log_softmax(-1)
        for m in session.view.matrices():
            m.write(before[m.name])
    if fitness == "kl":
        return float((dense.exp() * (dense - pruned)).sum()), int(keep.sum())
    return float(-pruned.gather(1, ids[:, 1:][keep][:, None]).sum()), int(keep.sum())


@pytest.mark.parametrize("fitness", ["kl", "perplexity"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"sparsity": "2:4"}),
        ("llama", {"method": "magnitude"}),
        ("llama", {"method": "sparsegpt", "scope": "block:16"}),
        ("gpt2", {}),
        ("mixtral", {}),
    ],
)
def test_a_trial_is_what_pruning_gives(tiny_folder, family, changes, fitness):
    session = session_of(tiny_folder(family), **changes)
    problem, made = plans(session)
    windows = search_windows(session)
    trials = trials_of(session, problem, windows, [1, 3], fitness=fitness, batch_tokens=64)
    before = weights(session)
    for plan in made:
        counts = tuple(plan.counts.values())
        got = [trials(counts, rung) for rung in (0, 1)]
        total, tokens = by_hand(session, windows, pruned_by_hand(session, problem, plan), fitness)
        assert sum(n for _, n in got) == tokens
        assert sum(v for v, _ in got) == pytest.approx(total, rel=1e-4, abs=1e-3)
        assert trials(counts, 0) == got[0]  # the same again, to the bit
    for name, weight in weights(session).items():
        assert torch.equal(weight, before[name])


def test_predictions_too_large_to_keep_are_computed_again(tiny_folder, monkeypatch):
    session = session_of(tiny_folder("llama"))
    problem, (plan, _) = plans(session)
    windows = search_windows(session)
    counts = tuple(plan.counts.values())
    kept = trials_of(session, problem, windows, [4])(counts, 0)
    monkeypatch.setattr("secateur.run.trials.PROBABILITIES", 0)
    assert trials_of(session, problem, windows, [4])(counts, 0) == pytest.approx(kept)


def test_padding_does_not_count(tiny_folder):
    session = session_of(tiny_folder("llama"))
    problem, (plan, _) = plans(session)
    windows = search_windows(session)
    mask = torch.ones_like(windows.ids, dtype=torch.bool)
    mask[1, 20:] = False
    padded = Windows(windows.ids, mask)
    trials = trials_of(session, problem, padded, [4])
    got = trials(tuple(plan.counts.values()), 0)
    want = by_hand(session, padded, pruned_by_hand(session, problem, plan), "kl")
    assert got == pytest.approx(want, rel=1e-4)


def test_a_trial_that_fails_leaves_the_weights_alone(tiny_folder, monkeypatch):
    session = session_of(tiny_folder("llama"))
    problem, (plan, _) = plans(session)
    trials = trials_of(session, problem, search_windows(session), [4])
    before, where = (
        weights(session),
        {m.name: m.tensor().data_ptr() for m in session.view.matrices()},
    )
    replay = trials.stages[0][0]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trials(tuple(plan.counts.values()), 0)
    for m in session.view.matrices():
        assert m.tensor().data_ptr() == where[m.name]
        assert torch.equal(m.tensor(), before[m.name])


def test_dense_plan_has_no_divergence(tiny_folder):
    session = session_of(tiny_folder("llama"), sparsity=0.0)
    problem, (plan, _) = plans(session, ("uniform", "uniform"))
    total, tokens = trials_of(session, problem, search_windows(session), [4])(
        tuple(plan.counts.values()), 0
    )
    assert total / tokens == pytest.approx(0.0, abs=1e-6)


def test_workers_open_the_same_trials_from_disk(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    session = session_of(folder)
    problem, (plan, _) = plans(session)
    windows = search_windows(session)
    rankings, _ = sorted_scores(session, problem.scores)
    write_trials(tmp_path, rankings, windows)
    back = read_rankings(tmp_path)
    assert all(torch.equal(back[n].places, rankings[n].places) for n in rankings)
    opener = OpenTrials(
        tmp_path, str(folder), "float32", "cpu", False, None, (), (), session.recipe.target, [2, 2], "kl", 64
    )  # fmt: skip
    here = Trials(
        session.view, rankings, windows, session.recipe.target, rungs=[2, 2], batch_tokens=64
    )
    counts = tuple(plan.counts.values())
    assert opener()(counts, 1) == here(counts, 1)


def test_the_trial_of_a_problem_is_lazy_and_remembers(tiny_folder, monkeypatch):
    session = session_of(tiny_folder("llama"))
    problem, (plan, other) = plans(session)
    assert isinstance(problem.trial, Trial)
    assert problem.trial.trials is None
    value = problem.trial(plan)
    assert 0 < value < math.inf
    assert problem.trial(plan) == value
    assert problem.trial(other) != value
    assert problem.trial.trials.evaluations == 2


def test_what_was_tried_is_not_tried_again_after_a_kill(tiny_folder, tmp_path):
    session = session_of(tiny_folder("llama"))
    problem, (plan, other) = plans(session)
    first = Trial(session, problem.scores, tmp_path)
    value = first(plan)
    second = Trial(session_of(tiny_folder("llama")), problem.scores, tmp_path)
    assert second(plan) == value
    assert second.trials is None  # not even opened
    assert second(other) == first(other)
    elsewhere = session_of(tiny_folder("llama"), search={"samples": 4, "seed": 5})
    assert Trial(elsewhere, problem.scores, tmp_path)(plan) != value


def test_text_of_the_evaluation_is_refused():
    text = {"text": "pydoc:test", "length": 64}
    session = session_of(
        evaluation=text | {"windows": None}, search={"samples": 4, "text": "pydoc:test"}
    )
    with pytest.raises(UsageError, match="the very text") as caught:
        search_windows(session)
    assert caught.value.field == "search.text"
    default = session_of(evaluation=text)  # the packaged corpus: train against test
    assert len(search_windows(default)) == 4


def test_search_windows_follow_their_recipe():
    session = session_of(search={"samples": 3, "length": 48, "seed": 7, "text": "pydoc"})
    windows = search_windows(session)
    assert windows.ids.shape == (3, 48)
    want = calibration_windows("pydoc", session.loaded.tokenizer, 3, 48, 7)
    assert torch.equal(windows.ids, want.ids)


@pytest.mark.parametrize("options", [{"name": "dsa", "search": 8}, {"name": "atp", "most": 3}])
def test_a_run_with_a_searching_allocator(tiny_folder, options):
    result = secateur.prune(
        tiny_folder("llama"),
        sparsity=0.5,
        samples=4,
        length=32,
        allocation=options,
        search={"samples": 2},
    )
    assert result.report["totals"]["delivered"] == pytest.approx(0.5, abs=1e-4)
    assert any("search split" in note for note in result.report["notes"])
    if options["name"] == "dsa":
        search = result.report["allocation"]["provenance"]["search"]
        assert search["history"][-1]["best"] <= search["start"]
    given = torch.randint(0, 60, (6, 32), generator=torch.Generator().manual_seed(0))
    again = secateur.prune(
        tiny_folder("llama"), sparsity=0.5, calibration=given, allocation=options
    )
    assert again.report["totals"]["delivered"] == pytest.approx(0.5, abs=1e-4)


def test_a_streamed_model_cannot_be_searched(tiny_folder, tmp_path):
    with pytest.raises(UsageError, match="in memory"):
        secateur.prune(
            tiny_folder("llama"), sparsity=0.5, samples=4, length=32, stream=True, out=tmp_path / "o",
            allocation={"name": "dsa", "search": 8},
        )  # fmt: skip
