"""What a method is: a score for every weight, and what it needs to know to give it.

A method's core is a pure function on tensors. Writing one takes a dozen lines::

    @dataclass(frozen=True)
    class MyMethod(Method):
        name = "mine"
        summary = "|W| times the mean square of its input"
        needs = frozenset({Need.INPUTS})

        def score(self, weight, evidence):
            return weight.abs() * evidence.moments().mean_square()

``secateur.testing.check_method(MyMethod())`` proves that it behaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict
from torch import Tensor

from secateur.errors import UsageError
from secateur.evidence.statistics import Evidence
from secateur.masks.target import Cut, Scope
from secateur.options import build

Update = Literal["none", "obs", "exact", "best"]


class Need(StrEnum):
    """Kinds of evidence the engine can gather; each is gathered once for all who need it."""

    INPUTS = "inputs"
    """Mean square of each input feature (diagonal second moments)."""
    GRAM = "gram"
    """Full second moments of the inputs."""
    GRAD_L1 = "grad-l1"
    GRAD_L2 = "grad-l2"
    GRAD_SIGNED = "grad-signed"


@dataclass(frozen=True)
class Decision:
    """What a method decided for one matrix.

    Attributes:
        mask: (d_out, d_in) bool, True where the weight goes.
        weight: survivors' new values if the method computes them, else None (unchanged).
        score: the importance it ranked by, for pictures and ``secateur why``; may be None.
        notes: figures of how it was found (damping used).
    """

    mask: Tensor
    weight: Tensor | None = None
    score: Tensor | None = None
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """What every method says of itself; its dataclass fields are its options."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    scope: ClassVar[Scope] = Scope("row")
    update: ClassVar[Update] = "none"
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    def requirements(self) -> frozenset[Need]:
        """The evidence needed with these options (``needs`` unless options change it)."""
        return self.needs

    @property
    def inexact(self) -> bool:
        """True if the count may miss the cut's by a few: only when an original is repeated."""
        return False

    @classmethod
    def with_options(cls, options: dict[str, Any]) -> Self:
        """Build from a recipe's options.

        Raises:
            UsageError: an unknown option, with the known ones named; or one of the wrong type.
        """
        what, fix = f"method '{cls.name}'", f"see 'secateur methods' for the options of {cls.name}"
        return build(cls, options, what, fix=fix)


@dataclass(frozen=True)
class Method(Described, ABC):
    """Ranks the weights of a matrix; subclasses are frozen dataclasses, their fields the options."""

    @abstractmethod
    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """Importance of each weight, float32 (d_out, d_in), higher = keep.

        Args:
            weight: (d_out, d_in), float32.
            evidence: what ``requirements`` asked for.
        """

    def decide(
        self, weight: Tensor, evidence: Evidence, cut: Cut, gone: Tensor | None = None
    ) -> Decision:
        """Choose what goes. The default ranks by ``score``; SparseGPT chooses while it updates.

        Args:
            weight: (d_out, d_in), float32.
            evidence: what ``requirements`` asked for.
            cut: how much goes, and in what scope or pattern.
            gone: (d_out, d_in) bool, weights that are zero already and go first.
        """
        from secateur.masks.selection import select

        score = self.score(weight, evidence)
        ranked = score if gone is None else score.masked_fill(gone, float("-inf"))
        return Decision(select(ranked, cut, evidence.name), None, score)


@dataclass(frozen=True)
class Published(Method):
    """A method whose original code can be repeated, its counting mistakes included.

    Attributes:
        compat: ``"reference"`` for the masks of the authors' code bit for bit (given the same
            statistics); they may miss the count by an element a group, more where scores tie.
    """

    compat: Literal["", "reference"] = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("", "reference"))

    @property
    def inexact(self) -> bool:
        """See ``Method.inexact``."""
        return self.compat == "reference"

    def decide(
        self, weight: Tensor, evidence: Evidence, cut: Cut, gone: Tensor | None = None
    ) -> Decision:
        """See ``Method.decide``; the originals know nothing of ``gone``."""
        from secateur.masks.selection import select_reference

        if self.compat != "reference":
            return super().decide(weight, evidence, cut, gone)
        score = self.score(weight, evidence)
        return Decision(select_reference(score, cut, evidence.name), None, score)


def one_of(field: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse an option that is not among the known ones.

    Raises:
        UsageError: naming the option, its value and the known ones.
    """
    if value not in known:
        raise UsageError(
            "unknown", field=field, value=value, fix=f"one of {', '.join(map(repr, known))}"
        )
