"""Following channels through one real forward of a network.

The network runs as it is; a ``TorchFunctionMode`` sees every call of torch and keeps the labels of
each tensor beside it (``channel_labels``), by the rules of ``channel_rules`` and
``channel_products``. So any Python control flow is followed, and what is not known has a name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.errors import SecateurError, UsageError
from secateur.models.channel_labels import (
    FREE,
    Atoms,
    aligned,
    along,
    changing,
    free,
    packed,
    small,
)
from secateur.models.channel_sizes import Sized, attributes
from secateur.models.units import Role

Unknown = Literal["error", "keep"]
"""What an operation that cannot be followed does: end the search, or keep its channels whole."""
_MOST_ELEMENTS = 1 << 25
_OUTSIDE = ("from_numpy", "tensor", "as_tensor", "asarray", "frombuffer", "from_dlpack")
"""What makes tensors of something that is none, and may have been an activation before."""


@dataclass(eq=False)
class Touch:
    """A dimension of a parameter or buffer that is counted in channels.

    Attributes:
        name, dim: which one.
        role: as of ``units.Slice``.
        labels: (n,) whose channel each position is.
        module: who owns it.
        port: (m,) channels of the module's input (``reads``) or output; None where it has none.
    """

    name: str
    dim: int
    role: Role
    labels: Tensor
    module: str
    port: Tensor | None = None


@dataclass(eq=False)
class Cost:
    """A product counted while following: see ``channel_cost.LayerCost``."""

    name: str
    kind: str
    factor: float
    labels: list[Tensor]


@dataclass(eq=False)
class Trace:
    """What is known so far."""

    model: nn.Module
    unknown: Unknown = "error"
    atoms: Atoms = field(default_factory=Atoms)
    touches: dict[tuple[str, int], Touch] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    counts: list[tuple[str, str, Tensor]] = field(default_factory=list)
    """(module, attribute, labels): an attribute that counts channels' units (``num_heads``)."""
    sized: list[Sized] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    """Labels of what goes through layer norms."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    """Parameters used otherwise than as a layer's weight: labels of each element."""
    stack: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._labels: Any = WeakTensorKeyDictionary()
        self._constants: Any = WeakTensorKeyDictionary()
        self.names: dict[int, str] = {}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            self.names.setdefault(id(tensor), name)
        self.modules = dict(self.model.named_modules())

    # -- where we are --------------------------------------------------------------------------

    @property
    def here(self) -> str:
        """The innermost module that is running."""
        return self.stack[-1] if self.stack else ""

    def module(self) -> nn.Module:
        """The same, itself."""
        return self.modules[self.here]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Keep ``stack`` while the model runs."""
        handles = []
        for name, module in self.modules.items():

            def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
                self.stack.append(name)

            def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                self.stack.pop()
                if isinstance(output, Tensor):
                    self.shapes[name] = tuple(output.shape)

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- labels --------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Tensor | None:
        """Labels of an activation, or of a parameter's elements; None for a constant."""
        found: Tensor | None = self._labels.get(tensor)
        if found is not None:
            return found
        name = self.names.get(id(tensor))
        if name is None or not tensor.is_floating_point() or tensor.numel() == 1:
            return None
        if name not in self.loose:
            owner = self.modules.get(name.rpartition(".")[0])
            standardised = isinstance(owner, nn.modules.conv._ConvNd) and tensor.dim() > 2
            if standardised or tensor.numel() > _MOST_ELEMENTS:
                return None
            self.loose[name] = self.atoms.fresh(tensor.numel()).view(tensor.shape)
        return self.loose[name]

    def certain(self, tensor: Tensor) -> Tensor:
        """Labels of a layer's input, ``FREE`` ones for a constant."""
        found = self.labels(tensor)
        return free(tensor.shape) if found is None else found

    def known(self, tensor: Tensor) -> bool:
        """Whether we saw where a tensor came from."""
        return tensor in self._labels or tensor in self._constants or id(tensor) in self.names

    def put(self, tensor: Tensor, labels: Tensor | None, constant: bool = True) -> None:
        """Remember the labels of a result, or that it has none."""
        if labels is None:
            if constant and tensor not in self._labels:
                self._constants[tensor] = True
            return
        if tuple(labels.shape) != tuple(tensor.shape):
            raise AssertionError(f"labels {tuple(labels.shape)} of a {tuple(tensor.shape)} tensor")
        self._labels[tensor] = packed(labels)

    def line(self, labels: Tensor, dim: int) -> Tensor:
        """(n,) labels along one dimension; along all others they are made the same."""
        dim %= labels.dim()
        parts = small(labels).movedim(dim, 0)
        parts = parts.reshape(parts.shape[0], -1)
        first = parts.amax(1)
        self.atoms.merge(parts, first[:, None].expand(parts.shape))
        return first.expand(labels.shape[dim]).contiguous()

    def roots(self, labels: Tensor) -> Tensor:
        """Labels by the first of all channels that are one."""
        return self.atoms.find(small(labels)).expand(labels.shape)

    def only_parameter(self, labels: Tensor) -> bool:
        """Whether these are elements of parameters that no layer's channels have met yet."""
        if not self.loose or not bool((small(labels) >= 0).any()):
            return False
        solid = np.ones(len(self.atoms), dtype=bool)
        for part in self.loose.values():
            solid[part.reshape(-1).numpy()] = False
        met = self.atoms.find(torch.from_numpy(np.flatnonzero(solid)))
        own = self.atoms.find(small(labels)).reshape(-1)
        return not bool(np.isin(own[own >= 0].numpy(), met.numpy()).any())

    def pin(self, labels: Tensor, why: str) -> None:
        """These channels never go."""
        where = f" in '{self.here}'" if self.here else ""
        self.atoms.pin(small(labels), why + where)

    def lost(self, what: str, labels: Sequence[Tensor] = ()) -> None:
        """An operation that cannot be followed.

        Raises:
            SecateurError: unless such operations are to keep their channels whole.
        """
        if self.unknown == "keep" and labels:
            for part in labels:
                self.pin(part, f"'{what}' cannot be followed")
            return
        raise SecateurError(
            "channels cannot be followed through this operation",
            field="model",
            value=f"{what} in '{self.here}' ({type(self.module()).__name__})",
            fix="write it with operations of torch.nn.functional, or let the channels that meet it "
            "alone: channel_groups(..., unknown='keep'), on the command line -S unknown=keep",
        )

    def joined(self, operands: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
        """Labels of an element-wise combination: what meets must go together."""
        operands = [t for t in operands if t.numel() > 1]
        if all(self.labels(t) is None for t in operands):
            return None
        return self.met([self.operand(t) for t in operands], shape)

    def operand(self, tensor: Tensor) -> Tensor:
        """Labels of an activation or constant; what was only expanded counts as having size 1."""
        found = self.labels(tensor)
        if found is not None:
            return found
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        return free([1 if step == 0 else size for size, step in sizes])

    def met(self, labels: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The same, of tensors with these labels (each of its tensor's shape)."""
        whole = self._without_bystanders(labels, len(shape))
        parts = aligned([*whole, free(shape)])[:-1]
        total = torch.full_like(parts[0], FREE)
        for part in parts:
            self.atoms.merge(part, total)
            total = torch.where(total >= 0, total, part)
        wide = changing(total)
        for one, part in zip(whole, parts, strict=True):
            offset = len(shape) - one.dim()
            sized = any(d >= offset and one.shape[d - offset] > 1 for d in wide)
            fixed = (part < 0) & (total >= 0)
            if sized and bool(fixed.any()) and not self.only_parameter(total[fixed]):
                self.pin(total[fixed], "meets a tensor of fixed size")
        return total.expand(tuple(shape))

    def _without_bystanders(self, labels: Sequence[Tensor], dims: int) -> list[Tensor]:
        """Parameters that are the same for every channel they meet (a mask of positions) are nobody's."""
        own = [self.only_parameter(part) for part in labels]
        wide = {
            d + dims - part.dim()
            for part, loose in zip(labels, own, strict=True)
            if not loose
            for d in changing(part)
        }
        found = []
        for part, loose in zip(labels, own, strict=True):
            offset = dims - part.dim()
            meets = any(d >= offset and part.shape[d - offset] > 1 for d in wide)
            found.append(free(part.shape) if loose and wide and not meets else part)
        return found

    def sized_by(self, value: Any, labels: Tensor, sure: bool = False) -> bool:
        """Note attributes of the running module of this value, which may count these channels.

        Args:
            labels: (n, m) of what lies at each of the n positions.
            sure: as of ``Sized``.
        """
        if type(value) is not int or not self.here:
            return False
        names = attributes(self.module(), value)
        self.sized += [Sized(self.here, name, None, labels, sure) for name in names]
        return bool(names)

    # -- layers --------------------------------------------------------------------------------

    def touch(
        self,
        tensor: Tensor | None,
        dim: int,
        role: Role,
        labels: Tensor,
        port: Tensor | None = None,
    ) -> None:
        """Note that ``dim`` of a weight counts these channels."""
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        if name is None:  # computed: a bias put together from others
            found = self.labels(tensor)
            if found is None or bool((found < 0).any()):
                self.pin(labels, "meets numbers that are computed when the model runs")
            else:
                self.atoms.merge(found.reshape(-1), labels)
            return
        before = self.touches.get((name, dim))
        if before is None:
            owner = name.rpartition(".")[0]
            self.touches[name, dim] = Touch(name, dim, role, labels, owner, port)
        else:  # used a second time: both uses lose the same
            self.atoms.merge(before.labels, labels)

    def new(self, weight: Tensor, count: int) -> Tensor:
        """The channels a weight makes: the same ones whenever it is used; one alone is nobody's."""
        name = self.names[id(weight)]
        if name not in self.made:
            self.made[name] = torch.tensor([FREE]) if count == 1 else self.atoms.fresh(count)
        return self.made[name]

    def cost(self, kind: str, factor: float, *labels: Tensor, name: str | None = None) -> None:
        """Count ``factor`` operations for each element of every one of ``labels``."""
        self.costs.append(Cost(name or self.here, kind, factor, list(labels)))


Rule = Callable[[Trace, "Call"], Any]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of torch that has been made: ``out`` is its result."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def x(self) -> Tensor:
        """The first argument."""
        value: Tensor = self.get(0, "input")
        return value

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also in lists."""
        found: list[Tensor] = []
        for value in [*self.args, *self.kwargs.values()]:
            parts = value if isinstance(value, list | tuple) else (value,)
            found += [part for part in parts if isinstance(part, Tensor)]
        return found


class _Follow(TorchFunctionMode):
    def __init__(self, trace: Trace, rules: dict[str, Rule], layers: Collection[str]) -> None:
        self.trace, self.rules, self.layers = trace, rules, layers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [out] if isinstance(out, Tensor) else out
        if not isinstance(results, list | tuple) or not any(isinstance(r, Tensor) for r in results):
            return out
        call = Call(_name(func), func, args, kwargs, out)
        labels = self._labels(call)
        found = [labels] if isinstance(out, Tensor) else labels or [None] * len(results)
        known = call.name not in _OUTSIDE and all(map(self.trace.known, call.tensors()))
        for tensor, part in zip(results, found, strict=False):
            if isinstance(tensor, Tensor):
                self.trace.put(tensor, part, known)
        return out

    def _labels(self, call: Call) -> Any:
        trace = self.trace
        rule = self.rules.get(call.name)
        # A layer's weights are no activations: only its input decides whether it matters.
        operands = call.tensors()[:1] if call.name in self.layers else call.tensors()
        known = [part for t in operands if (part := trace.labels(t)) is not None]
        if call.name in self.layers and operands and not trace.known(operands[0]):
            trace.lost("something before it that is no call of torch")
        if not known:
            return None
        if rule is not None:
            return rule(trace, call)
        if all(bool((small(part) == FREE).all()) for part in known):
            results = [call.out] if isinstance(call.out, Tensor) else call.out
            found = [free(r.shape) if isinstance(r, Tensor) else None for r in results]
            return found[0] if isinstance(call.out, Tensor) else found
        if not all(
            map(trace.only_parameter, known)
        ):  # else a weight that is computed: no channels yet
            trace.lost(call.name, known)
        return None


def _name(func: Any) -> str:
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__"):
        name = str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name.strip("_")


@torch.no_grad()
def follow(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    unknown: Unknown = "error",
) -> Trace:
    """Run ``model`` once on ``example`` and follow its channels.

    Args:
        example: input(s) of the model, of batch size 1 if FLOPs are to be those of one image.

    Raises:
        SecateurError: an operation that cannot be followed, naming it and its module.
        UsageError: the model does not run on the example.
    """
    from secateur.models.channel_products import LAYERS
    from secateur.models.channel_rules import RULES

    inputs = example if isinstance(example, tuple) else (example,)
    trace = Trace(model, unknown)
    modes = {module: module.training for module in model.modules()}
    place = next(iter(model.parameters()), torch.zeros(0)).device
    inputs = tuple(t.to(place) if isinstance(t, Tensor) else t for t in inputs)
    try:
        model.eval()
        for tensor in (t for t in inputs if isinstance(t, Tensor)):
            dim = 1 if tensor.dim() > 2 else tensor.dim() - 1
            channels = trace.atoms.fresh(tensor.shape[dim])
            trace.atoms.pin(channels, "comes with the model's input")
            trace.put(tensor, along(channels, dim, tensor.shape))
        with trace.inside(), _Follow(trace, RULES, LAYERS):
            output = model(*inputs)
    except SecateurError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(
            f"the model does not run on its example input ({type(error).__name__}: {error})",
            field="model",
            value=f"{type(model).__name__} on {[tuple(t.shape) for t in inputs if isinstance(t, Tensor)]}",
            fix="give images of the size and number of channels it was made for",
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    for tensor in _tensors(output):
        labels = trace.labels(tensor)
        if labels is not None:
            trace.atoms.pin(small(labels), "is the model's output")
    return trace


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dict__"):  # a dataclass, or whatever else carries ``logits``
        yield from _tensors(vars(output))
