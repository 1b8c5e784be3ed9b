"""OWL, DLP, ATP and DSA against their formulas written out, on readings of small blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation import Problem, allocators
from secateur.allocation.atp import grid, steepest
from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.presets import save_preset
from secateur.errors import NumericsError, UsageError
from secateur.evidence.readings import BlockFacts, MatrixFacts
from secateur.evidence.statistics import InputMoments
from secateur.masks.target import Target

WIDTHS = (24, 40)


def model(blocks=5, seed=0, unequal=False, constant=False):
    """(weights, input root mean squares) by block and matrix."""
    random = torch.Generator().manual_seed(seed)
    out = []
    for b in range(blocks):
        matrices = {}
        for m, width in enumerate(WIDTHS):
            rows = 16 * (1 + (b if unequal else 0))
            w = torch.randn(rows, width, generator=random)
            x = torch.rand(width, generator=random) + 0.5
            w[:, :2] *= 1 + 3 * b  # later blocks have more outliers
            if constant:
                w, x = torch.ones(rows, width), torch.ones(width)
            matrices[f"layers.{b}.m{m}"] = (w, x)
        out.append(matrices)
    return out


def problem_for(allocator, blocks, target=0.7, **known):
    facts = []
    for b, matrices in enumerate(blocks):
        rows = []
        for name, (w, x) in matrices.items():
            moments = InputMoments(len(x))
            moments.update(x[None] * torch.ones(4, 1))
            rows.append(MatrixFacts(name, "", tuple(w.shape), lambda w=w: w, moments))
        facts.append(BlockFacts(b, f"layers.{b}", rows))
    return Problem(
        target=Target.parse(target),
        shapes={n: tuple(w.shape) for m in blocks for n, (w, _) in m.items()},
        blocks=tuple(tuple(m) for m in blocks),
        readings={r: [r.read(f) for f in facts] for r in allocator.readings()},
        **known,
    )


def wanda(matrices):
    return torch.cat([(w.abs() * x).reshape(-1) for w, x in matrices.values()]).double().numpy()


def by_block(problem, wishes):
    values = [[wishes[n] for n in block] for block in problem.blocks]
    assert all(len(set(v)) == 1 for v in values)
    return np.array([v[0] for v in values])


def owl(**options):
    return allocators["owl"].with_options(options)


def dsa(**options):
    return allocators["dsa"].with_options(options)


@pytest.mark.parametrize("m", [3.0, 5.0, 4.25])
def test_owl_is_its_formula(m):
    blocks, allocator = model(), owl(m=m)
    problem = problem_for(allocator, blocks)
    a = [wanda(matrices) for matrices in blocks]
    d = np.array([(v > m * v.mean()).mean() for v in a])
    scaled = (d - d.min()) / (d.max() - d.min())
    want = 0.7 - 2 * 0.08 * (scaled - scaled.mean())
    assert by_block(problem, allocator.wishes(problem)) == pytest.approx(want, abs=1e-12)


def test_owl_of_magnitude_needs_no_data():
    allocator = owl(scores="magnitude")
    assert not any(r.inputs for r in allocator.readings())
    problem = problem_for(allocator, model())
    wishes = by_block(problem, allocator.wishes(problem))
    assert wishes.max() - wishes.min() == pytest.approx(0.16)


def test_owl_for_patterns_meets_the_budget_where_the_released_one_rounds():
    blocks, allocator = model(6), owl(m=2)
    problem = problem_for(allocator, blocks, "3:8")
    a = [wanda(matrices) for matrices in blocks]
    d = np.array([(v > 2 * v.mean()).mean() for v in a])
    scaled = 2.0 * (d - d.min()) / (d.max() - d.min())
    want = 5 - (scaled - scaled.mean())  # removed of 8, before rounding
    assert 8 * by_block(problem, allocator.wishes(problem)) == pytest.approx(want)
    plan = allocator.plan(problem)
    assert plan.removed == problem.target.count(plan.elements)
    removed = [8 - plan.patterns[block[0]][0] for block in problem.blocks]
    assert np.abs(np.array(removed) - want).max() <= 1


def test_owl_written_as_a_dsa_function_is_owl():
    for m in (5.0, 3.0, 4.25):
        for target in (0.5, 0.7):
            blocks = model(7, seed=3, unequal=True)
            one = owl(m=m)
            other = dsa(expression=f"W:(NO_OP)-(OUTLIER:{m:g})-(NEG)-(8)")
            problem = problem_for(one, blocks, target)
            again = problem_for(other, blocks, target)
            a = by_block(problem, one.wishes(problem))
            b = by_block(again, other.wishes(again))
            assert np.abs(a - b).max() <= 1e-12
            assert one.plan(problem).counts == other.plan(again).counts


@pytest.mark.parametrize("average", ["mean", "median"])
def test_dlp_is_its_formula(average):
    blocks = model()
    allocator = allocators["dlp"].with_options({"average": average})
    problem = problem_for(allocator, blocks)
    score = np.array([getattr(np, average)(wanda(matrices)) for matrices in blocks])
    importance = 1 - score / score.sum()
    scaled = (importance - importance.min()) / (importance.max() - importance.min())
    want = 0.7 - 2 * 0.15 * (scaled - scaled.mean())
    tolerance = 1e-6 if average == "mean" else 5e-3
    assert by_block(problem, allocator.wishes(problem)) == pytest.approx(want, abs=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["paper", "owl", "uniform", "W:(NORMALIZE,TANH)-(VAR)-(SIN)-(10)"]),
    st.sampled_from([0.3, 0.5, 0.7, "2:4"]),
    st.booleans(),
)
def test_dsa_plans_are_exact_whatever_the_function(function, target, unequal):
    options = {"preset": function} if "W:" not in function else {"expression": function}
    allocator = dsa(**options)
    problem = problem_for(allocator, model(4, unequal=unequal), target)
    plan = allocator.plan(problem)
    assert plan.removed == problem.target.count(plan.elements)


def test_dsa_range_and_mean():
    allocator = dsa(expression="W:(NO_OP)-(MEAN)-(NO_OP)", lam=0.05)
    problem = problem_for(allocator, model(5, unequal=True))
    wishes = by_block(problem, allocator.wishes(problem))
    assert wishes.max() - wishes.min() == pytest.approx(0.1)
    assert np.average(wishes, weights=problem.block_sizes) == pytest.approx(0.7, abs=1e-12)
    turned = dsa(expression="W:(NO_OP)-(MEAN)-(NEG)", lam=0.05)
    other = by_block(problem, turned.wishes(problem_for(turned, model(5, unequal=True))))
    assert (np.argsort(wishes) == np.argsort(-other)).all()


def test_lambda_of_the_text_counts_unless_another_is_given():
    for options, want in (
        ({"expression": "W:(NO_OP)-(MEAN)-(NO_OP)-(4)"}, 0.08),
        ({"expression": "W:(NO_OP)-(MEAN)-(NO_OP)-(4)", "lam": 0.1}, 0.2),
        ({"expression": "W:(NO_OP)-(MEAN)-(NO_OP)-(4)", "compat": "reference"}, 0.16),
        ({"expression": "W:(NO_OP)-(MEAN)-(NO_OP)"}, 0.16),
    ):
        allocator = dsa(**options)
        problem = problem_for(allocator, model())
        wishes = by_block(problem, allocator.wishes(problem))
        assert wishes.max() - wishes.min() == pytest.approx(want)


def test_a_function_that_is_not_finite_is_refused_except_as_the_reference():
    text = "W:(EXP)-(MEAN)-(ASIN)"
    problem = problem_for(dsa(expression=text), model())
    with pytest.raises(NumericsError, match="ASIN") as caught:
        dsa(expression=text).plan(problem)
    assert caught.value.value == text
    plan = dsa(expression=text, compat="reference").plan(problem)
    assert any("same in every block" in note for note in problem.notes)
    assert plan.removed == problem.target.count(plan.elements)


@pytest.mark.parametrize("name", ["owl", "dlp", "dsa"])
def test_constant_scores_give_uniform_and_say_so(name):
    allocator = allocators[name].with_options({})
    problem = problem_for(allocator, model(constant=True))
    assert set(allocator.wishes(problem).values()) == {0.7}
    assert any("uniform" in note for note in problem.notes)


@pytest.mark.parametrize("name", ["owl", "dlp", "dsa", "atp"])
def test_one_block_takes_the_whole_target(name):
    allocator = allocators[name].with_options({})
    problem = problem_for(allocator, model(1))
    plan = allocator.plan(problem)
    assert plan.removed == problem.target.count(plan.elements)
    assert max(plan.ratios.values()) - min(plan.ratios.values()) < 0.01


def test_zeros_that_alone_decide_a_geometric_mean_are_told():
    blocks = model()
    for dead in ((), (2,), range(5)):
        for b in dead:
            blocks[b][f"layers.{b}.m0"][0][0, 0] = 0
        problem = problem_for(dsa(), blocks)
        dsa().plan(problem)
        assert any("1 of 5 blocks (the first: 2)" in n for n in problem.notes) == (dead == (2,))
        other = problem_for(dsa(preset="owl"), blocks)
        dsa(preset="owl").plan(other)
        assert other.notes == []


def test_a_found_function_is_used_by_path(tmp_path):
    path = tmp_path / "found.json"
    save_preset(path, Expression.parse("W:(TANH)-(STD)-(SIN)-(4)"), "magnitude", {})
    allocator = dsa(preset=str(path))
    assert allocator.kind_of_scores == "magnitude"
    assert not any(r.inputs for r in allocator.readings())
    plan = allocator.plan(problem_for(allocator, model()))
    assert plan.provenance["options"] == {"preset": str(path)}


def test_scores_of_the_method_are_streamed():
    blocks = model()
    stream = lambda: ((n, w.abs() * x) for m in blocks for n, (w, x) in m.items())  # noqa: E731
    text = "W:(NO_OP)-(MEAN)-(NO_OP)"
    own, read = dsa(expression=text, scores="method"), dsa(expression=text)
    a = own.wishes(problem_for(own, blocks, scores=stream))
    b = read.wishes(problem_for(read, blocks))
    assert a == pytest.approx(b, abs=1e-6)


WRONG = [
    ("owl", {"lam": 0.6}, "lam"),
    ("owl", {"m": 0}, "m"),
    ("dlp", {"alpha": -0.1}, "alpha"),
    ("dsa", {"preset": "papr"}, "preset"),
    ("dsa", {"expression": "W:(ABS)"}, "expression"),
    ("dsa", {"expression": "W:(ABS)-(VAR)-(SIN)", "preset": "paper"}, "expression"),
    ("dsa", {"search": -1}, "search"),
    ("dsa", {"search": 9, "preset": "paper"}, "search"),
    ("dsa", {"lam": 2.0}, "lam"),
    ("dsa", {"scores": "gradient"}, "scores"),
    ("atp", {"step": 0}, "step"),
    ("atp", {"most": 0}, "most"),
]


@pytest.mark.parametrize(("name", "options", "field"), WRONG)
def test_wrong_options_are_named(name, options, field):
    with pytest.raises(UsageError) as caught:
        allocators[name].with_options(options)
    assert caught.value.field == field


# -- searching ---------------------------------------------------------------------------------


def test_atp_is_its_progression_and_keeps_to_its_slope():
    allocator = allocators["atp"].with_options({"beta": 0.02})
    problem = problem_for(allocator, model(5))
    want = 0.7 - 0.02 * 2 + 0.02 * np.arange(5)
    assert by_block(problem, allocator.wishes(problem)) == pytest.approx(want)
    steep = allocators["atp"].with_options({"beta": 0.2})
    with pytest.raises(UsageError, match=r"beyond 0\.15"):
        steep.wishes(problem)
    assert steepest(0.7, 5) == pytest.approx(0.15)
    assert grid(0.7, 5, 0.002, 12) == pytest.approx([0.0125 * i for i in range(1, 13)])
    assert grid(0.7, 32, 0.002, 100) == pytest.approx([0.002 * i for i in range(1, 10)])


def test_atp_finds_the_slope_that_tries_best():
    allocator = allocators["atp"].with_options({"max_sparsity": 1.0})
    tried = []

    def trial(plan):
        tried.append(plan)
        ratios = [plan.ratios[f"layers.{b}.m0"] for b in range(5)]
        return abs((ratios[4] - ratios[0]) / 4 - 0.05)

    problem = problem_for(allocator, model(5), trial=trial)
    plan = allocator.plan(problem)
    slope = (plan.ratios["layers.4.m0"] - plan.ratios["layers.0.m0"]) / 4
    assert slope == pytest.approx(0.05, abs=0.003)
    assert len(tried) == 13  # the grid, and no slope at all
    assert plan.removed == problem.target.count(plan.elements)
    with pytest.raises(UsageError, match="tries plans on text"):
        allocator.plan(problem_for(allocator, model(5)))


def test_dsa_search_ends_at_least_as_well_as_uniform_and_owl():
    blocks = model(6)
    allocator = dsa(search=40)
    owl_plan = owl().plan(problem_for(owl(), blocks))
    values = {}

    def trial(plan):
        ratios = np.array([plan.ratios[f"layers.{b}.m0"] for b in range(6)])
        value = float(np.square(ratios - np.linspace(0.78, 0.62, 6)).sum())
        values[tuple(plan.counts.values())] = value
        return value

    problem = problem_for(allocator, blocks, trial=trial)
    plan = allocator.plan(problem)
    assert len(values) == 40
    found = values[tuple(plan.counts.values())]
    assert found == min(values.values())
    assert found <= values[tuple(owl_plan.counts.values())]
    assert plan.provenance["expression"].startswith("W:(")
    again = allocator.plan(problem_for(allocator, blocks, trial=trial))
    assert again.counts == plan.counts
    uniform = dsa(search=12)
    flat = uniform.plan(
        problem_for(
            uniform, blocks, trial=lambda p: max(p.ratios.values()) - min(p.ratios.values())
        )
    )
    assert max(flat.ratios.values()) - min(flat.ratios.values()) < 0.01
