"""Finding a model's units: attentions and MLPs by the roles of their linears, then the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.models.anatomy import text_config
from secateur.models.discovery import is_conv1d, is_experts, is_linear
from secateur.models.families import Attention, Family, family_of, is_router, qkv_rows, role_of
from secateur.models.units import (
    KINDS,
    Gqa,
    Group,
    Kind,
    Role,
    Slice,
    Units,
    parameters_of,
    stack_of,
)

HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
CROSS = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")
INWARD = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "fc1")
OUTWARD = ("o", "down", "fc2")
_IN_LIST = re.compile(r"^(?P<list>.*?)\.?(?P<index>\d+)\.(?P<rest>.*)$")
_INNER_NORM = re.compile(r"(^|\.)(q|k)_(layer)?norm$")


@dataclass(frozen=True)
class AttentionLayout:
    """One attention as it is now.

    Attributes:
        key: path that q and o have in common.
        owner: the module whose forward knows the head counts, and its path.
        names: role -> name of the linear (q, k, v, o; or qkv, o).
        heads, kv_heads, head_dim: as the tensors' shapes say.
        fused: row layout of qkv, if fused.
    """

    key: str
    owner: str
    names: dict[str, str]
    heads: int
    kv_heads: int
    head_dim: int
    fused: str | None
    block: int
    stack: str
    attention: str

    @property
    def shared(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def rows(self) -> dict[str, tuple[str, Tensor]]:
        """``q`` (heads, d), ``k`` and ``v`` (kv_heads, d): the linear and its rows of each head."""
        counts = Attention(self.heads, self.kv_heads, self.head_dim)
        if self.fused:
            table = qkv_rows(cast(Any, self.fused), counts)
            return {role: (self.names["qkv"], rows) for role, rows in table.items()}
        q = torch.arange(self.heads * self.head_dim).view(self.heads, -1)
        kv = torch.arange(self.kv_heads * self.head_dim).view(self.kv_heads, -1)
        return {role: (self.names[role], q if role == "q" else kv) for role in "qkv"}

    def columns(self) -> Tensor:
        """(heads, d) inputs of o that each head writes."""
        return torch.arange(self.heads * self.head_dim).view(self.heads, -1)


@dataclass(frozen=True)
class MlpLayout:
    """One MLP as it is now: its linears by role, and its channels."""

    key: str
    names: dict[str, str]
    width: int
    block: int
    stack: str


@dataclass(frozen=True)
class Layout:
    """Where a model's attentions, MLPs and lists of blocks lie."""

    family: Family | None
    linears: dict[str, tuple[str, nn.Module]]
    attentions: list[AttentionLayout]
    mlps: list[MlpLayout]
    lists: dict[str, int]
    originals: dict[str, list[int]]
    skipped: dict[str, str]

    def alias(self, name: str) -> str:
        """``name`` with the number its block had in the original model."""
        for path, numbers in self.originals.items():
            rest = name.removeprefix(f"{path}.")
            number, _, tail = rest.partition(".")
            if rest != name and number.isdigit():
                return f"{path}.{numbers[int(number)]}.{tail}".rstrip(".")
        return name


def layout_of(model: nn.Module) -> Layout:
    """Look at ``model``; nothing is taken from its config but the family's name."""
    from secateur.masks.structured import structure_of

    pruned = structure_of(model)
    family = family_of(getattr(text_config(model), "model_type", None))
    linears: dict[str, tuple[str, nn.Module]] = {}
    skipped: dict[str, str] = {}
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        if is_experts(module) or is_router(name, family) or ".experts." in name:
            skipped[name] = "part of a mixture of experts, whose units are not cut"
        elif is_linear(module):
            linears[name] = (role_of(name, family), module)
    blocks: dict[tuple[str, int], dict[str, list[str]]] = {}
    for name, (role, _) in linears.items():
        place = _IN_LIST.match(name)
        if place and role:
            where = (place["list"], int(place["index"]))
            blocks.setdefault(where, {}).setdefault(role, []).append(name)
            lists[where[0]] = max(lists.get(where[0], 0), where[1] + 1)
    attentions: list[AttentionLayout] = []
    mlps: list[MlpLayout] = []
    for (path, index), roles in blocks.items():
        stack = stack_of(path)
        attentions += _attentions(model, family, path, index, stack, roles, linears)
        mlps += _mlps(path, index, stack, roles, linears)
    originals = {
        path: pruned.kept(path) for path in lists if pruned is not None and path in pruned.gone
    }
    found = Layout(family, linears, attentions, mlps, lists, originals, skipped)
    if originals:  # keys keep the numbers that blocks had before any was dropped
        found.attentions[:] = [replace(a, key=found.alias(a.key)) for a in attentions]
        found.mlps[:] = [replace(m, key=found.alias(m.key)) for m in mlps]
    return found


def _attentions(
    model: nn.Module,
    family: Family | None,
    path: str,
    index: int,
    stack: str,
    roles: dict[str, list[str]],
    linears: dict[str, tuple[str, nn.Module]],
) -> Iterator[AttentionLayout]:
    for first in [*roles.get("q", ()), *roles.get("qkv", ())]:
        if not roles.get("o"):
            continue
        out = max(roles["o"], key=lambda o: len(_common(first, o)))
        names = {"o": out}
        owner = first.rpartition(".")[0]
        if first in roles.get("qkv", ()):
            names["qkv"] = first
        else:
            names["q"] = first
            for role in "kv":
                beside = [n for n in roles.get(role, ()) if n.rpartition(".")[0] == owner]
                names.update((role, n) for n in beside)
        if "qkv" not in names and not {"k", "v"} <= set(names):
            continue
        module = model.get_submodule(owner)
        width = _inputs(linears[out][1])
        head_dim = next((int(getattr(module, a)) for a in HEAD_DIMS if hasattr(module, a)), None)
        if head_dim is None or width % head_dim:
            continue
        heads = width // head_dim
        rows = _outputs(linears[names.get("k", first)][1]) // head_dim
        kv = (rows - heads) // 2 if "qkv" in names else rows
        fused = family.qkv if family and "qkv" in names else None
        if kv < 1 or ("qkv" in names and fused is None):
            continue
        key = _common(first, out)
        kind = "cross" if any(c in owner.lower() for c in CROSS) else "self"
        yield AttentionLayout(key, owner, names, heads, kv, head_dim, fused, index, stack, kind)


def _mlps(
    path: str,
    index: int,
    stack: str,
    roles: dict[str, list[str]],
    linears: dict[str, tuple[str, nn.Module]],
) -> Iterator[MlpLayout]:
    block = f"{path}.{index}" if path else str(index)
    for last in [*roles.get("down", ()), *roles.get("fc2", ())]:
        names = {"down": last}
        for role in ("gate", "up", "gate_up", "fc1"):
            found = roles.get(role, ())
            if found:
                near = max(found, key=lambda n: len(_common(n, last)))
                if len(found) == 1 or _common(near, last) != block:
                    names[role] = near
        if len(names) == 1:
            continue
        key = _common(*[n for r, n in names.items() if r != "down"][:1], last)
        key = f"{block}.ffn" if key == block else key
        yield MlpLayout(key, names, _inputs(linears[last][1]), index, stack)


def find_units(model: nn.Module, kinds: Sequence[str], gqa: Gqa) -> Units:
    """See ``units.units_of``."""
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(
                "no such kind of unit", field="kinds", value=kind, fix=f"of {', '.join(KINDS)}"
            )
    layout = layout_of(model)
    builder = _Builder(model, layout)
    groups: list[Group] = []
    if {"head", "kv_group"} & set(kinds):
        mode = "groups" if "head" not in kinds else gqa
        if mode == "groups":
            _refuse_single_groups(layout.attentions)
        groups += [builder.heads(a, mode) for a in layout.attentions]
    if "ffn" in kinds:
        groups += [builder.channels(m) for m in layout.mlps]
    order = list(layout.lists)
    groups.sort(key=lambda g: (_list_of(g.key, order), g.block or 0, g.kind == "ffn", g.key))
    for kind in ("head", "ffn"):
        if kind in kinds and not any((g.kind == "ffn") == (kind == "ffn") for g in groups):
            raise UsageError(
                f"no {kind} of this model can be cut",
                field="kinds",
                value=kind,
                fix="; ".join(sorted(set(layout.skipped.values()))) or "the family is not known",
            )
    if "stem" in kinds:
        groups.append(builder.stem())
    if "layer" in kinds:
        groups.append(builder.layers())
    return Units(groups, layout.skipped)


def _refuse_single_groups(attentions: Sequence[AttentionLayout]) -> None:
    """A layer down to its last group keeps it; a model with nothing else has none to give."""
    shared = [a for a in attentions if a.shared > 1]
    if shared and len(shared) == len(attentions) and all(a.kv_heads == 1 for a in shared):
        raise UsageError(
            f"all heads of '{shared[0].key}' share one key-value head: it is the only group",
            field="gqa",
            value="groups",
            fix="gqa: even removes query heads and keeps the shared keys and values; or "
            "kinds: [ffn]",
        )


class _Builder:
    def __init__(self, model: nn.Module, layout: Layout) -> None:
        from secateur.masks.structured import structure_of

        self.model = model
        self.layout = layout
        self.parameters = parameters_of(model)
        self.pruned = structure_of(model)

    def alive(self, key: str, now: int) -> tuple[Tensor, int]:
        """Original numbers of the ``now`` finest units of ``key``, and how many there were."""
        gone = None if self.pruned is None else self.pruned.gone.get(key)
        if gone is None:
            return torch.arange(now), now
        left = torch.nonzero(~gone).reshape(-1)
        if len(left) != now:
            raise UsageError(
                f"'{key}' has {now} units, its record says {len(left)}",
                field="model",
                value=type(self.model).__name__,
                fix="the model was cut by other means after it was loaded",
            )
        return left, len(gone)

    def heads(self, at: AttentionLayout, gqa: Gqa) -> Group:
        alive, total = self.alive(at.key, at.heads)
        rows, columns = at.rows(), at.columns()
        shared = at.heads // at.kv_heads
        if shared > 1 and gqa == "groups":
            q = rows["q"][1].reshape(at.kv_heads, -1)
            slices = self._linear(rows["q"][0], q, "writes")
            for role in "kv":
                slices += self._linear(*rows[role], "writes")
            slices += self._linear(at.names["o"], columns.reshape(at.kv_heads, -1), "reads")
            return self._group(
                at.key, "kv_group", slices, alive.view(at.kv_heads, shared), total, at, shared
            )
        slices = self._linear(*rows["q"], "writes")
        if shared == 1:
            for role in "kv":
                slices += self._linear(*rows[role], "writes")
        slices += self._linear(at.names["o"], columns, "reads")
        even = at.kv_heads if shared > 1 and gqa == "even" else 1
        return self._group(at.key, "head", slices, alive[:, None], total, at, 1, even)

    def channels(self, at: MlpLayout) -> Group:
        alive, total = self.alive(at.key, at.width)
        own = torch.arange(at.width)[:, None]
        slices: list[Slice] = []
        for role in ("gate", "up", "fc1"):
            if role in at.names:
                slices += self._linear(at.names[role], own, "writes")
        if "gate_up" in at.names:
            both = torch.cat([own, own + at.width], 1)
            slices += self._linear(at.names["gate_up"], both, "writes")
        slices += self._linear(at.names["down"], own, "reads")
        return self._group(at.key, "ffn", slices, alive[:, None], total, at)

    def stem(self) -> Group:
        """The residual width: every parameter that reads or writes the residual stream."""
        width = int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
        own = torch.arange(width)[:, None]
        slices: list[Slice] = []
        if any("mixture" in why for why in self.layout.skipped.values()):
            self._no_stem("its experts and routers read it too")
        for name, (role, module) in self.layout.linears.items():
            reads, writes = _inputs(module), _outputs(module)
            if role in OUTWARD:
                if writes != width:
                    self._no_stem(f"'{name}' writes {writes} channels, the embedding {width}")
                slices += self._linear(name, own, "writes")
            elif role in INWARD:
                if reads != width:
                    self._no_stem(f"'{name}' reads {reads} channels, the embedding {width}")
                slices += self._linear(name, own, "reads")
            elif reads == width == writes:
                self._no_stem(f"'{name}' maps it to another space of the same width")
            elif reads == width:
                slices += self._linear(name, own, "reads")
        for name, module in self.model.named_modules():
            kind = type(module).__name__
            table = module._parameters
            if isinstance(module, nn.Embedding) and module.embedding_dim == width:
                if "relative_attention_bias" not in name:
                    slices.append(Slice(f"{name}.weight", 1, "embed", own))
            elif "Norm" in kind and not _INNER_NORM.search(name):
                slices += [
                    Slice(f"{name}.{leaf}", 0, "norm", own)
                    for leaf in ("weight", "bias")
                    if table.get(leaf) is not None and cast(Tensor, table[leaf]).numel() == width
                ]
        alive, total = self.alive("stem", width)
        return self._group("stem", "stem", slices, alive[:, None], total)

    def _no_stem(self, why: str) -> None:
        raise UsageError(
            f"the residual width of this model cannot be cut: {why}",
            field="kinds",
            value="stem",
            fix="cut heads, ffn or layers",
        )

    def layers(self) -> Group:
        """Whole blocks of a decoder whose blocks are the identity when they write nothing."""
        lists = self.layout.lists
        family = self.layout.family
        config = text_config(self.model)
        post = family is not None and family.name in ("bert", "bart", "t5")
        post = post or not getattr(config, "do_layer_norm_before", True)
        if len(lists) != 1 or post:
            raise UsageError(
                "only the blocks of a decoder that normalises before its blocks can go whole",
                field="kinds",
                value="layer",
                fix="cut heads or ffn",
            )
        path, now = next(iter(lists.items()))
        alive, total = self.alive(path, now)
        inside = [p for n, p in self.parameters.items() if n.startswith(f"{path}.")]
        matrices = sum(p.numel() for p in inside if p.dim() > 1) // now
        heads = self.layout.attentions[0] if self.layout.attentions else None
        return Group(
            path,
            "layer",
            (),
            alive[:, None],
            total,
            heads=heads.heads if heads else 0,
            head_dim=heads.head_dim if heads else 0,
            weights=matrices,
            parameters=sum(p.numel() for p in inside) // now,
        )

    def _linear(self, name: str, index: Tensor, role: Role) -> list[Slice]:
        """Slices of a linear: its outputs and biases if it writes, else its inputs."""
        module = self.layout.linears[name][1]
        outputs = 1 if is_conv1d(module) else 0
        dim = outputs if role == "writes" else 1 - outputs
        slices = [Slice(f"{name}.weight", dim, role, index)]
        if role == "writes" and module._parameters.get("bias") is not None:
            slices.append(Slice(f"{name}.bias", 0, role, index))
        return slices

    def _group(
        self,
        key: str,
        kind: Kind,
        slices: list[Slice],
        original: Tensor,
        total: int,
        at: AttentionLayout | MlpLayout | None = None,
        heads: int = 1,
        even: int = 1,
    ) -> Group:
        weights = parameters = 0
        seen: dict[int, str] = {}
        for part in slices:
            tensor = self.parameters[part.parameter]
            size = tensor.numel() // tensor.shape[part.dim] * part.index.shape[1]
            if tensor.dim() > 1 and part.role in ("reads", "writes"):
                weights += size
            if seen.setdefault(id(tensor), part.parameter) == part.parameter:  # tied: once
                parameters += size
        is_heads = isinstance(at, AttentionLayout)
        return Group(
            key,
            kind,
            tuple(slices),
            original,
            total,
            block=None if at is None else at.block,
            stack="decoder" if at is None else at.stack,
            attention=at.attention if isinstance(at, AttentionLayout) else "",
            even=even,
            heads=heads if is_heads else 0,
            head_dim=at.head_dim if isinstance(at, AttentionLayout) else 0,
            weights=weights,
            parameters=parameters,
        )


def _inputs(module: nn.Module) -> int:
    weight = cast(Tensor, module._parameters["weight"])
    return int(weight.shape[0 if is_conv1d(module) else 1])


def _outputs(module: nn.Module) -> int:
    weight = cast(Tensor, module._parameters["weight"])
    return int(weight.shape[1 if is_conv1d(module) else 0])


def _common(*names: str) -> str:
    """The dotted path that all ``names`` begin with."""
    parts = [n.split(".") for n in names]
    same = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return ".".join(same)


def _list_of(key: str, order: list[str]) -> int:
    return next((i for i, path in enumerate(order) if key.startswith(f"{path}.")), len(order))
