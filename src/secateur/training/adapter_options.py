"""What kind of adapter is put on, and where; checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import UsageError
from secateur.options import build
from secateur.training.low_rank import KINDS, Init, Kind


@dataclass(frozen=True)
class AdapterOptions:
    """What is put on, and where.

    Attributes:
        kind: ``mask-lora``, ``scale-lora`` and ``spp`` keep the zeros while they train; ``lora-prune``
            trains a dense update and keeps the zeros when it is merged; ``lora`` is for
            matrices without a mask (after structured cuts).
        rank: of the update.
        alpha: the update is multiplied by alpha / rank (``scale-lora`` has no such factor).
        dropout: on the layer's input (``lora``, ``lora-prune``) or on the entries of BA, while
            gradients are formed.
        every: of ``mask-lora``: the mask takes part in every so many steps only; in the steps
            between, W + s BA is trained, at plain LoRA's cost. What is merged is masked.
        init: how ``scale-lora`` starts; ``ones`` stays of rank one for ever.
        targets: roles (q, k, v, o, gate, up, down, fc1, fc2 ...) or patterns on names; none
            means every matrix.
        head: a plain LoRA on the output head as well (it is not pruned).
        seed: of the initial A, and of dropout.
    """

    kind: Kind = "mask-lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    every: int = 1
    init: Init = "broken"
    targets: tuple[str, ...] = ()
    head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        def refuse(name: str, what: str, fix: str) -> None:
            raise UsageError(what, field=name, value=getattr(self, name), fix=fix)

        if self.kind not in KINDS:
            refuse("kind", "no such adapter", f"one of {', '.join(KINDS)}")
        if self.rank < 1:
            refuse("rank", "an adapter has a rank of 1 or more", "16 is usual")
        if not 0 < self.alpha < float("inf"):
            refuse("alpha", "with this factor nothing can be learnt", "2 x rank is usual")
        if not 0 <= self.dropout < 1:
            refuse("dropout", "is a share in [0, 1)", "0 unless you train for many epochs")
        if self.every < 1 or (self.every > 1 and self.kind != "mask-lora"):
            refuse("every", "only mask-lora can leave its mask out", "1, or kind: mask-lora")
        if self.init not in ("broken", "ones"):
            refuse("init", "no such start", "one of broken, ones")

    @classmethod
    def of(cls, kind: str, options: Mapping[str, Any]) -> AdapterOptions:
        """From a recipe's words.

        Raises:
            UsageError: an unknown option, one of the wrong type or out of range.
        """
        return build(cls, options, "an adapter", kind=kind)

    @property
    def scale(self) -> float:
        """What BA is multiplied by."""
        return 1.0 if self.kind == "scale-lora" else self.alpha / self.rank
