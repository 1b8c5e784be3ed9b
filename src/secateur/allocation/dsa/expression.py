"""DSA's functions as text: grammar, parser, printing.

    W:(PRE,PRE)-(REDUCE)-(POST,POST)-(LAMBDA)

Zero to two pre operators (none is written ``NO_OP``), one reduction, one or two post
operators, and an optional lambda in hundredths: ``W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)``. Case
and spaces are free. A reduction with a parameter takes it after a colon, ``OUTLIER:5``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from secateur.allocation.dsa.operators import PARAMETER, POST, PRE, REDUCE, REFUSED
from secateur.errors import UsageError

SHAPE = "W:(PRE,PRE)-(REDUCE)-(POST,POST)-(LAMBDA)"
_WORD = re.compile(r"\s*([^\s,():\-][^\s,()]*)")


@dataclass(frozen=True)
class Expression:
    """A function of a block's scores, and how far it may move the ratios.

    Attributes:
        pre: zero to two names of ``operators.PRE``, applied in order.
        reduce: a name of ``operators.REDUCE``.
        post: one or two names of ``operators.POST``, applied in order.
        hundredths: lambda times 100; None leaves it to the allocator.
        parameter: of the reduction, where it takes one.
    """

    pre: tuple[str, ...]
    reduce: str
    post: tuple[str, ...]
    hundredths: int | None = None
    parameter: float | None = None

    def __str__(self) -> str:
        """Canonical text; ``parse`` gives the same expression back."""
        reduce = self.reduce
        if self.parameter is not None:
            reduce += f":{self.parameter:g}"
        parts = [",".join(self.pre) or "NO_OP", reduce, ",".join(self.post)]
        if self.hundredths is not None:
            parts.append(str(self.hundredths))
        return "W:" + "-".join(f"({part})" for part in parts)

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Read the text form.

        Raises:
            UsageError: says what was expected, what was found, and at which character.
        """
        return _Reader(text).expression()


class _Reader:
    """A cursor over the text; every complaint says where it stands (characters from 1)."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, what: str, at: int | None = None, fix: str | None = None) -> UsageError:
        where = self.at if at is None else at
        found = self.text[where : where + 12]
        place = f"at character {where + 1}" + (f", '{found}'" if found else ", the end")
        return UsageError(
            f"{what} {place}",
            field="expression",
            value=self.text,
            fix=fix or f"the form is {SHAPE}",
        )

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self, mark: str) -> bool:
        self.skip()
        return self.text.startswith(mark, self.at)

    def take(self, mark: str) -> None:
        if not self.peek(mark):
            raise self.fail(f"expected '{mark}'")
        self.at += len(mark)

    def words(self, what: str) -> list[tuple[str, int]]:
        """The names inside one pair of brackets, each with its place."""
        self.take("(")
        found: list[tuple[str, int]] = []
        while True:
            match = _WORD.match(self.text, self.at)
            if match is None:
                self.skip()
                raise self.fail(f"expected {what}")
            found.append((match[1].upper(), match.start(1)))
            self.at = match.end()
            if self.peek(")"):
                self.at += 1
                return found
            if not self.peek(","):
                raise self.fail("expected ',' or ')'")
            self.at += 1

    def named(self, word: tuple[str, int], known: Iterable[str], what: str) -> str:
        name, at = word
        names = list(known)
        if name in names:
            return name
        if name.isdigit() and what == "post operator":
            raise self.fail(
                "expected a post operator", at, f"lambda is the fourth part: (NO_OP)-({name})"
            )
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise self.fail(f"there is no {what} '{name}',", at, f"{hint}known: {', '.join(names)}")

    def expression(self) -> Expression:
        self.skip()
        if not self.text[self.at : self.at + 1].upper() == "W":
            raise self.fail("expected 'W:'")
        self.at += 1
        self.take(":")
        before = self.words("a pre operator")
        self.limit(before, 2, "pre operators")
        pre = tuple(self.named(word, PRE, "pre operator") for word in before)
        self.take("-")
        reduce, parameter = self.reduction()
        self.take("-")
        after = self.words("a post operator")
        self.limit(after, 2, "post operators")
        post = tuple(self.named(word, POST, "post operator") for word in after)
        hundredths = self.hundredths() if self.peek("-") else None
        self.skip()
        if self.at < len(self.text):
            raise self.fail("expected the end")
        pre = tuple(name for name in pre if name != "NO_OP")
        return Expression(pre, reduce, post, hundredths, parameter)

    def limit(self, words: list[tuple[str, int]], most: int, what: str) -> None:
        if len(words) > most:
            raise self.fail(f"at most {most} {what}, so not one more", words[most][1])

    def reduction(self) -> tuple[str, float | None]:
        words = self.words("a reduction")
        self.limit(words, 1, "reduction")
        whole, at = words[0]
        name, colon, value = whole.partition(":")
        if name in REFUSED:
            known = ", ".join(REDUCE)
            raise self.fail(f"the reduction {name} {REFUSED[name]},", at, f"one of {known}")
        self.named((name, at), REDUCE, "reduction")
        if name not in PARAMETER:
            if colon:
                raise self.fail(f"{name} takes no parameter", at + len(name))
            return name, None
        if not colon:
            return name, PARAMETER[name]
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not 0 < number < float("inf"):
            raise self.fail("expected a positive number", at + len(name) + 1)
        return name, number

    def hundredths(self) -> int:
        self.take("-")
        words = self.words("lambda in hundredths")
        word, at = words[0]
        if len(words) > 1 or not word.isdecimal() or int(word) > 50:
            raise self.fail(
                "expected lambda in hundredths", at, "a whole number from 0 to 50: 8 means 0.08"
            )
        return int(word)
