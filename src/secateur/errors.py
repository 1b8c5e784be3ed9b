"""The errors a user can meet: each names the field, the value and the fix."""

from __future__ import annotations


class SecateurError(Exception):
    """Something could not be done; the message says what, and how to mend it.

    Shown without a traceback by the command line, which exits with ``exit_code``
    (1: the work failed; 2: the request itself is wrong).
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: object = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.field = field
        self.value = value
        self.fix = fix
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message on one line, or two when there is a fix."""
        head = f"{self.field}={self.value!r}: {self.message}" if self.field else self.message
        return f"{head}\n  fix: {self.fix}" if self.fix else head

    def record(self) -> dict[str, object]:
        """The error for machines (``--json``)."""
        return {
            "error": self.message,
            "field": self.field,
            "value": None if self.value is None else str(self.value),
            "fix": self.fix,
            "exit_code": self.exit_code,
        }


class UsageError(SecateurError):
    """The request is wrong: out of range, contradictory, or names what is not there."""

    exit_code = 2


class NumericsError(SecateurError):
    """NaN, infinity or a matrix that cannot be factored; names the module it met it in."""


class VerificationError(SecateurError):
    """What was delivered is not what was asked for; nothing of it should be trusted."""


class MissingExtra(UsageError):
    """An optional package is needed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            fix=f"pip install 'secateur[{extra}]'",
        )
