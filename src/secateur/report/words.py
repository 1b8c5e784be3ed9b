"""Figures as people read them."""

from __future__ import annotations

import math

NOTHING = "–"
THIN = "\N{NO-BREAK SPACE}"
"""Between a number and its unit, so that no line breaks there."""


def count(value: float | None) -> str:
    """A whole number with thousands apart.

    >>> count(106168320)
    '106,168,320'
    """
    return NOTHING if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """A large number in few digits.

    >>> short(134515008), short(2_400)
    ('134.5 M', '2,400')
    """
    if value is None:
        return NOTHING
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return (
                f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:.1f} {unit}"
            )
    return count(value)


def percent(share: float | None, digits: int = 2) -> str:
    r"""A share as a percentage, without trailing zeros.

    >>> percent(0.5), percent(0.33333)
    ('50\xa0%', '33.33\xa0%')
    """
    if share is None or not math.isfinite(share):
        return NOTHING
    text = f"{100 * share:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + f"{THIN}%"


def change(before: float, after: float) -> str:
    r"""By how much ``after`` differs from ``before``, signed.

    >>> change(20.0, 30.0)
    '+50\xa0%'
    """
    share = after / before - 1
    digits = 1 if abs(share) < 0.1 else 0
    return ("+" if share >= 0 else "−") + percent(abs(share), digits)


def size(value: float | None) -> str:
    r"""Bytes, in powers of ten.

    >>> size(268_900_000)
    '268.9\xa0MB'
    """
    if value is None:
        return NOTHING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{THIN}{unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """A stretch of time.

    >>> duration(0.34), duration(200)
    ('0.34 s', '3 min 20 s')
    """
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def figure(value: float | None, digits: int = 4) -> str:
    """A measured number in a few significant digits.

    >>> figure(30.2177), figure(0.000123), figure(15600)
    ('30.22', '0.000123', '15,600')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 1e-3 else f"{value:#.{digits}g}".rstrip(".")


def ratio(value: float | None) -> str:
    """A factor.

    >>> ratio(1.034)
    '1.03×'
    """
    return NOTHING if value is None else f"{value:.2f}×"


def level(value: float) -> str:
    """A round number beside an axis.

    >>> level(5.0), level(0.05), level(2000)
    ('5', '0.05', '2,000')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
