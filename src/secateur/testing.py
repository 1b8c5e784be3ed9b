"""A contract kit: proves that a method behaves, in the manner of scikit-learn's check_estimator.

from secateur.testing import check_method
check_method(MyMethod())
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from secateur.evidence.statistics import Evidence, GradientMoments, InputMoments
from secateur.masks.target import Cut, Scope, Target
from secateur.methods.base import Method, Need
from secateur.methods.prune_matrix import prune_matrix

__all__ = ["check_method", "example_evidence"]

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
