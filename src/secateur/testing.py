"""Contract kits: prove that a method or an allocator behaves, as scikit-learn's check_estimator.

from secateur.testing import check_method
check_method(MyMethod())
check_allocator(MyAllocator())
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.allocation.base import Allocator, Problem
from secateur.allocation.plan import Plan
from secateur.evidence.readings import BlockFacts, MatrixFacts
from secateur.evidence.statistics import Evidence, GradientMoments, InputMoments
from secateur.masks.target import Cut, Scope, Target
from secateur.methods.base import Method, Need
from secateur.methods.prune_matrix import prune_matrix

__all__ = ["check_allocator", "check_method", "example_evidence", "example_problem"]

_SHAPES = ((8, 16), (5, 12), (1, 8), (16, 8))
_TARGETS = ("0", "0.3", "0.5", "0.9", "2:4", "1:4")
_SCOPES = ("row", "layer", "block:4")
_NORMS = {Need.GRAD_L1: "l1", Need.GRAD_L2: "l2", Need.GRAD_SIGNED: "signed"}


def example_evidence(
    method: Method, shape: tuple[int, int], seed: int = 0
) -> tuple[Tensor, Evidence]:
    """A weight (d_out, d_in) and evidence from random correlated data.

    Only what ``method`` declares is there, plus second moments if its update needs them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(64, columns, generator=generator) @ mixing
    needs = method.requirements()
    gram = Need.GRAM in needs or method.update != "none"
    moments = InputMoments(columns, gram=gram)
    moments.update(inputs)
    norms = tuple(norm for need, norm in _NORMS.items() if need in needs)
    gradients = GradientMoments(norms)
    for _ in range(4):
        gradients.update(torch.randn(rows, columns, generator=generator) * 1e-2)
    evidence = Evidence(
        "example",
        moments if gram or Need.INPUTS in needs else None,
        gradients if norms else None,
        sequences=4,
    )
    return weight, evidence


def _cases(method: Method) -> Iterator[tuple[tuple[int, int], Cut]]:
    for shape in _SHAPES:
        for text in _TARGETS:
            target = Target.parse(text)
            scopes = ("row",) if target.is_pattern else {*_SCOPES, str(method.scope)}
            for scope in sorted(scopes):
                yield shape, Cut.of(shape, target, Scope.parse(scope))


def check_method(method: Method) -> None:
    """Prove the contract every method of Secateur keeps, on small matrices of many shapes.

    * the mask holds exactly the asked count, or exactly the N:M pattern;
    * pruned weights are zero, survivors finite; shape, dtype (float32, bfloat16) and device
      are kept;
    * the weight given is not changed; the same input gives the same answer;
    * sparsity 0 changes nothing;
    * the pruned weight, pruned again to the same cut, loses the same weights and no others;
    * what ``requirements`` names is all it needs: other evidence is not there.

    Raises:
        AssertionError: naming the property, the type and the cut.
        ValueError, KeyError: it read evidence that it does not declare.
    """
    assert method.name, "a method has a name"
    assert method.summary, "a method says in a line what it ranks by"
    for shape, cut in _cases(method):
        weight, evidence = example_evidence(method, shape)
        for dtype in (torch.float32, torch.bfloat16):
            _check_case(method, weight.to(dtype), evidence, cut)


def _check_case(method: Method, weight: Tensor, evidence: Evidence, cut: Cut) -> None:
    where = f"{method.name}, {weight.dtype}, cut {cut}"
    before = weight.clone()
    result = prune_matrix(method, weight, evidence, cut, method.update)
    assert torch.equal(weight, before), f"the weight given was changed: {where}"
    assert result.mask.dtype == torch.bool, f"the mask is not boolean: {where}"
    assert result.mask.shape == weight.shape, f"the mask has another shape: {where}"
    assert int(result.mask.sum()) == cut.count, f"not exactly the asked count: {where}"
    if cut.keep is not None and cut.group is not None:
        gone = result.mask.reshape(len(weight), -1, cut.group).sum(-1)
        assert bool((gone == cut.group - cut.keep).all()), f"not {cut.keep}:{cut.group}: {where}"
    assert result.weight.shape == weight.shape, f"the weight has another shape: {where}"
    assert result.weight.dtype == weight.dtype, f"the dtype changed: {where}"
    assert result.weight.device == weight.device, f"the device changed: {where}"
    assert bool((result.weight[result.mask] == 0).all()), f"a pruned weight is left: {where}"
    assert bool(torch.isfinite(result.weight).all()), f"survivors are not finite: {where}"
    again = prune_matrix(method, weight, evidence, cut, method.update)
    assert torch.equal(again.mask, result.mask), f"not deterministic: {where}"
    assert torch.equal(again.weight, result.weight), f"not deterministic: {where}"
    if cut.count == 0:
        assert torch.equal(result.weight, weight), f"sparsity 0 changed weights: {where}"
    twice = prune_matrix(method, result.weight, evidence, cut, method.update)
    assert torch.equal(twice.mask, result.mask), f"pruned again, other weights go: {where}"


def example_problem(
    allocator: Allocator, target: Target, blocks: int = 4, seed: int = 0
) -> Problem:
    """A made-up model of ``blocks`` blocks, with what ``allocator`` asks for and no more."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    facts = []
    for b in range(blocks):
        matrices, features = [], {}
        for side in ("input", "output"):
            features[side] = torch.randn(48, 16, generator=generator)
        for role, shape in (("q", (16, 16)), ("up", (24 + 8 * b, 16)), ("down", (16, 24 + 8 * b))):
            name = f"layers.{b}.{role}"
            weights[name] = torch.randn(shape, generator=generator) * (1 + b)
            moments = InputMoments(shape[1])
            x = torch.randn(48, shape[1], generator=generator)
            moments.update(x)
            features |= {f"{name}|input": x, f"{name}|output": x @ weights[name].T}
            weight = weights[name]
            matrices.append(MatrixFacts(name, role, shape, weight.clone, moments))
        facts.append(BlockFacts(b, f"layers.{b}", matrices, features))
    return Problem(
        target,
        {n: (int(w.shape[0]), int(w.shape[1])) for n, w in weights.items()},
        tuple(tuple(m.name for m in f.matrices) for f in facts),
        {m.name: m.role for f in facts for m in f.matrices},
        {r: [r.read(f) for f in facts] for r in allocator.readings()},
        weights=lambda: iter(weights.items()),
        scores=lambda: ((n, w.abs()) for n, w in weights.items()),
        trial=lambda plan: sum((r - 0.5) ** 2 for r in plan.ratios.values()),
    )


def check_allocator(allocator: Allocator) -> None:
    """Prove the contract every allocator of Secateur keeps, on a made-up model.

    * the plan removes exactly what was asked: to the weight, or to half a step of N:M;
    * no ratio leaves the bounds; with N:M every matrix keeps at least one of M;
    * the same problem gives the same plan; the plan survives JSON;
    * a single block gets the target; sparsity 0 removes nothing;
    * what ``readings`` names is all it needs: nothing else was read.

    Raises:
        AssertionError: naming the property and the target.
        ValueError: it read what it does not declare.
    """
    assert allocator.name, "an allocator has a name"
    assert allocator.summary, "an allocator says in a line how it shares out"
    for text in ("0", "0.37", "0.5", "0.8", "4:8"):
        for blocks in (1, 4):
            target = Target.parse(text)
            plan = allocator.plan(example_problem(allocator, target, blocks))
            again = allocator.plan(example_problem(allocator, target, blocks))
            where = f"{allocator.name} at {text}, {blocks} blocks"
            assert plan.counts == again.counts, f"not deterministic: {where}"
            assert Plan.of_record(plan.record()).counts == plan.counts, f"not JSON: {where}"
            wanted = target.count(plan.elements)
            step = 1 if target.group is None else 256 // target.group
            assert 2 * abs(plan.removed - wanted) <= (step if step > 1 else 0), f"budget: {where}"
            low, high = allocator.bounds(example_problem(allocator, target, blocks))
            if target.group is None:
                for name, ratio in plan.ratios.items():
                    slack = 1 / (plan.shapes[name][0] * plan.shapes[name][1])
                    inside = low - slack <= ratio <= high + slack
                    assert inside, f"'{name}' out of bounds: {where}"
            else:
                assert all(n >= 1 for n, _ in plan.patterns.values()), f"keeps none: {where}"
