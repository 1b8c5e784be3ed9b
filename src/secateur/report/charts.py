"""Charts as inline SVG: lines, bars, heat maps, histograms.

Every function returns one ``<svg>`` with a title and a description for screen readers, its
text escaped. Colours come from the page's CSS variables (``templates/style.css``), so charts
follow light and dark; ``standalone`` embeds them for use outside a page. Text does not scale
with the page: where a chart spans the page, ``responsive`` draws it twice, wide and narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from itertools import pairwise

from markupsafe import Markup

WIDE, HALF, NARROW = 928, 432, 320
"""Widths at which text has its natural size: a whole card, half a card, a telephone's."""

TONES = 6


@dataclass(frozen=True)
class Series:
    """A line: points (x, y) joined in order, and marks (x, y, label) that stand alone."""

    label: str
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float, str]] = ()
    tone: int = 0


@dataclass(frozen=True)
class Bar:
    """A horizontal bar with an optional interval; ``text`` is written at its end."""

    label: str
    value: float
    text: str = ""
    low: float | None = None
    high: float | None = None
    tone: int = 0


@dataclass(frozen=True)
class Cell:
    """A field of a heat map: a value, words for the tooltip, and whether it wants attention."""

    value: float
    words: str = ""
    alert: bool = False


@dataclass
class _Canvas:
    title: str
    width: float
    height: float
    description: str = ""
    parts: list[str] = field(default_factory=list)

    def add(self, markup: str) -> None:
        self.parts.append(markup)

    def text(
        self, x: float, y: float, words: str, kind: str = "tick", anchor: str = "start"
    ) -> None:
        self.add(
            f'<text x="{x:.1f}" y="{y:.1f}" class="c-{kind}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="c-{kind}"/>'
        )

    def markup(self) -> Markup:
        about = f"<desc>{escape(self.description)}</desc>" if self.description else ""
        return Markup(
            f'<svg class="chart" role="img" aria-label="{escape(self.title)}" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" xmlns="http://www.w3.org/2000/svg">'
            f"<title>{escape(self.title)}</title>{about}{''.join(self.parts)}</svg>"
        )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high].

    >>> ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not 1e-300 < span < math.inf:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten inside [low, high]; fewer of each ten when there are many.

    >>> log_ticks(20, 900)
    [20.0, 50.0, 100.0, 200.0, 500.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
        if len(found) <= 8:
            break
    return found if len(found) > 1 else ticks(low, high, 4)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: float = WIDE,
    height: float = 300,
    log_y: bool = False,
    from_zero: bool = False,
    reference: tuple[float, str] | None = None,
    x_text: Callable[[float], str] = lambda x: f"{x:g}",
    y_text: Callable[[float], str] = lambda y: f"{y:g}",
    description: str = "",
) -> Markup:
    """Lines over a common x; ``reference`` is a dashed level with its name."""
    canvas = _Canvas(title, width, height, description)
    spots = [(x, y) for s in series for x, y in [*s.points, *((m[0], m[1]) for m in s.marks)]]
    spots = [(x, y) for x, y in spots if _drawable(y, log_y)]
    if not spots:
        canvas.text(width / 2, height / 2, "nothing to draw", "label", "middle")
        return canvas.markup()
    levels = [y for _, y in spots] + ([reference[0]] if reference else [])
    low, high = _margin(min(levels), max(levels), log_y, from_zero)
    left_x, right_x = min(x for x, _ in spots), max(x for x, _ in spots)
    if left_x == right_x:
        left_x, right_x = left_x - 0.5, right_x + 0.5
    marks = log_ticks(low, high) if log_y else ticks(low, high, max(3, int(height // 60)))
    left = 14 + 7.2 * max(len(y_text(t)) for t in marks)
    top = 30 + (_legend(canvas, series, 12) if len(series) > 1 else 0)
    bottom, right = height - 44, width - 18
    scale = math.log if log_y else float

    def at_x(x: float) -> float:
        return left + (x - left_x) / (right_x - left_x) * (right - left)

    def at_y(y: float) -> float:
        share = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return bottom - share * (bottom - top)

    canvas.text(4, top - 14, y_label, "label")
    for tick in marks:
        canvas.line(left, at_y(tick), right, at_y(tick), "grid")
        canvas.text(left - 8, at_y(tick) + 4, y_text(tick), "tick", "end")
    places = sorted({x for x, _ in spots})
    crowded = any(at_x(b) - at_x(a) < 36 for a, b in pairwise(places))
    if len(places) > 8 or crowded:
        places = ticks(left_x, right_x, max(3, int((right - left) // 90)))
    for tick in places:
        canvas.text(at_x(tick), bottom + 18, x_text(tick), "tick", "middle")
    canvas.line(left, bottom, right, bottom, "axis")
    canvas.text((left + right) / 2, height - 6, x_label, "label", "middle")
    if reference is not None:
        canvas.line(left, at_y(reference[0]), right, at_y(reference[0]), "reference")
        canvas.text(right, at_y(reference[0]) - 6, reference[1], "label", "end")
    for s in series:
        _draw_series(canvas, s, at_x, at_y, log_y, x_text, y_text)
    return canvas.markup()


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    width: float = HALF,
    reference: tuple[float, str] | None = None,
    description: str = "",
) -> Markup:
    """Horizontal bars from zero, longest interval inside the frame."""
    row, top = 46.0, 6.0
    canvas = _Canvas(title, width, top + row * len(bars) + (18 if reference else 2), description)
    reach = max([b.high or b.value for b in bars] + [reference[0] if reference else 0.0, 1e-12])
    room = width - 4 - 7.4 * max((len(b.text) for b in bars), default=0) - 14
    for i, bar in enumerate(bars):
        y = top + i * row
        length = max(1.5, bar.value / reach * room)
        canvas.text(0, y + 12, bar.label, "name")
        canvas.add(
            f'<rect x="0" y="{y + 18:.1f}" width="{length:.1f}" height="16" rx="3" '
            f'class="c-bar tone-{bar.tone % TONES}"><title>{escape(bar.label)}: '
            f"{escape(bar.text or f'{bar.value:g}')}</title></rect>"
        )
        end = length
        if bar.low is not None and bar.high is not None and bar.high > bar.low:
            x1, x2 = max(0.0, bar.low) / reach * room, bar.high / reach * room
            canvas.line(x1, y + 26, x2, y + 26, "whisker")
            for x in (x1, x2):
                canvas.line(x, y + 21, x, y + 31, "whisker")
            end = max(end, x2)
        canvas.text(end + 8, y + 31, bar.text, "value")
    if reference is not None:
        x = reference[0] / reach * room
        canvas.line(x, top + 14, x, top + row * len(bars), "reference")
        canvas.text(min(x, width - 60), canvas.height - 4, reference[1], "tick", "middle")
    return canvas.markup()


@dataclass(frozen=True)
class Column:
    """A layer: what it had and what it has, on one scale; ``fixed`` ones could lose nothing."""

    label: str
    before: float
    after: float
    words: str = ""
    fixed: bool = False


def column_chart(
    columns: Sequence[Column],
    *,
    title: str,
    y_label: str,
    width: float = WIDE,
    height: float = 240,
    y_text: Callable[[float], str] = lambda y: f"{y:g}",
    description: str = "",
) -> Markup:
    """Upright bars in order, pale for what was there and full for what is left."""
    canvas = _Canvas(title, width, height, description)
    peak = max([c.before for c in columns] + [c.after for c in columns] + [1e-12])
    marks = ticks(0, peak, max(3, int(height // 60)))
    left = 14 + 7.2 * max(len(y_text(t)) for t in marks)
    top, bottom = 30.0, height - 30.0
    pitch = min(64.0, (width - left - 4) / max(1, len(columns)))
    canvas.text(4, top - 14, y_label, "label")
    for tick in marks:
        y = bottom - tick / peak * (bottom - top)
        canvas.line(left, y, width - 4, y, "grid")
        canvas.text(left - 8, y + 4, y_text(tick), "tick", "end")
    wide = max(1.0, pitch - (3 if pitch > 8 else 1))
    for i, column in enumerate(columns):
        x = left + i * pitch
        for value, opacity in ((column.before, 0.25), (column.after, 1.0)):
            tall = value / peak * (bottom - top)
            canvas.add(
                f'<rect x="{x:.1f}" y="{bottom - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'fill-opacity="{opacity}" class="c-bar tone-{5 if column.fixed else 0}">'
                f"<title>{escape(column.words or column.label)}</title></rect>"
            )
    canvas.line(left, bottom, width - 4, bottom, "axis")
    every = max(1, math.ceil(26 / pitch))
    for i in range(0, len(columns), every):
        canvas.text(left + i * pitch + wide / 2, bottom + 16, str(i + 1), "tick", "middle")
    return canvas.markup()


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Cell | None]],
    *,
    title: str,
    low: float,
    high: float,
    text: Callable[[float], str] = lambda v: f"{v:g}",
    x_label: str = "",
    width: float = WIDE,
    tone: int = 0,
    tallest: float = 26,
    description: str = "",
) -> Markup:
    """A grid of fields, the fuller the colour the higher the value; None is left empty."""
    left = 10 + 7.2 * max((len(r) for r in rows), default=0)
    pitch = min(56.0, (width - left - 2) / max(1, len(columns)))
    tall = min(tallest, max(18.0, pitch))
    top, bottom = 4.0, 4.0 + tall * len(rows)
    canvas = _Canvas(title, width, bottom + 52, description)
    gap = 2.0 if pitch > 8 else 0.6
    span = (high - low) or 1.0
    for i, (name, line) in enumerate(zip(rows, cells, strict=True)):
        y = top + i * tall
        canvas.text(left - 8, y + tall / 2 + 4, name, "tick", "end")
        for j, cell in enumerate(line):
            if cell is None:
                continue
            share = min(1.0, max(0.0, (cell.value - low) / span))
            alert = " c-alert" if cell.alert else ""
            canvas.add(
                f'<rect x="{left + j * pitch:.1f}" y="{y:.1f}" width="{pitch - gap:.1f}" '
                f'height="{tall - 2:.1f}" rx="2" class="c-cell tone-{tone}{alert}" '
                f'fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{escape(cell.words)}</title></rect>'
            )
    every = max(1, math.ceil(26 / pitch))
    for j in range(0, len(columns), every):
        canvas.text(left + (j + 0.5) * pitch - gap / 2, bottom + 14, columns[j], "tick", "middle")
    if x_label:
        canvas.text(left, bottom + 38, x_label, "label")
    _ramp(canvas, low, high, text, tone, bottom + 26)
    return canvas.markup()


def histogram(
    edges: Sequence[float],
    kept: Sequence[int],
    pruned: Sequence[int],
    *,
    title: str,
    x_label: str,
    threshold: float | None = None,
    width: float = HALF,
    height: float = 220,
    description: str = "",
) -> Markup:
    """Kept and pruned weights by score, stacked; ``threshold`` is on the scale of ``edges``."""
    canvas = _Canvas(title, width, height, description)
    top, bottom = 46.0, height - 40.0
    peak = max(1, max((k + p for k, p in zip(kept, pruned, strict=True)), default=1))
    span = (edges[-1] - edges[0]) or 1.0

    def at(x: float) -> float:
        return 2 + (x - edges[0]) / span * (width - 4)

    for i, (k, p) in enumerate(zip(kept, pruned, strict=True)):
        x, wide = at(edges[i]), at(edges[i + 1]) - at(edges[i]) - 0.8
        y = bottom
        for n, tone in ((p, 1), (k, 0)):
            if n:
                tall = n / peak * (bottom - top)
                y -= tall
                canvas.add(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                    f'class="c-bar tone-{tone}"/>'
                )
    canvas.line(0, bottom, width, bottom, "axis")
    for tick in ticks(edges[0], edges[-1], 5):
        canvas.text(min(max(at(tick), 12), width - 14), bottom + 16, f"{tick:g}", "tick", "middle")
    canvas.text(width / 2, height - 6, x_label, "label", "middle")
    _legend(canvas, [Series("pruned", (), tone=1), Series("kept", (), tone=0)], 12)
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        canvas.line(at(threshold), top - 20, at(threshold), bottom, "reference")
        side = "end" if at(threshold) > width * 0.6 else "start"
        shift = -6 if side == "end" else 6
        canvas.text(at(threshold) + shift, top - 10, "threshold", "tick", side)
    return canvas.markup()


def responsive(draw: Callable[[float], Markup], wide: float = WIDE) -> Markup:
    """The chart for wide and for narrow screens; CSS shows one of them."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        draw(wide), draw(NARROW)
    )


def standalone(svg: Markup) -> str:
    """An SVG file of its own: the page's colours embedded."""
    css = (resources.files("secateur.report") / "templates" / "style.css").read_text("utf-8")
    return str(svg).replace("</title>", f"</title><style>{css}</style>", 1)


def _drawable(y: float, log: bool) -> bool:
    return 1e-100 < y < 1e100 if log else math.isfinite(y)


def _margin(low: float, high: float, log: bool, from_zero: bool) -> tuple[float, float]:
    if log:
        low, high = low / 1.08, high * 1.15
        return (low, high) if high / low > 1.5 else (low / 1.2, high * 1.2)
    low = min(0.0, low) if from_zero else low
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero else low - pad), high + pad


def _legend(canvas: _Canvas, series: Sequence[Series], top: float) -> float:
    """Names with their colours in as many lines as they need; returns the height used."""
    x, y = 2.0, top
    for s in series:
        wide = 34 + 7.2 * len(s.label)
        if x + wide > canvas.width and x > 2:
            x, y = 2.0, y + 20
        canvas.add(
            f'<rect x="{x:.1f}" y="{y - 8:.1f}" width="10" height="10" rx="2" '
            f'class="c-bar tone-{s.tone % TONES}"/>'
        )
        canvas.text(x + 16, y + 1, s.label, "name")
        x += wide
    return y - top + 24


def _draw_series(
    canvas: _Canvas,
    series: Series,
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    log_y: bool,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> None:
    tone = f"tone-{series.tone % TONES}"
    points = [(x, y) for x, y in series.points if _drawable(y, log_y)]
    if len(points) > 1:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        canvas.add(f'<polyline points="{path}" class="c-line {tone}"/>')
    radius = 3.5 if len(points) <= 48 else 1.8
    for x, y in points:
        words = escape(f"{series.label}, {x_text(x)}: {y_text(y)}".lstrip(", "))
        canvas.add(
            f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="{radius}" class="c-dot {tone}">'
            f"<title>{words}</title></circle>"
        )
    for x, y, label in series.marks:
        if not _drawable(y, log_y):
            continue
        cx, cy = at_x(x), at_y(y)
        words = escape(f"{series.label}, {label}: {y_text(y)}")
        canvas.add(
            f'<path d="M{cx:.1f} {cy - 6:.1f}l6 6-6 6-6-6z" class="c-mark {tone}">'
            f"<title>{words}</title></path>"
        )


def _ramp(
    canvas: _Canvas, low: float, high: float, text: Callable[[float], str], tone: int, y: float
) -> None:
    """The key of a heat map, at the right."""
    steps, wide = 8, 12.0
    after = text(high)
    x = canvas.width - 4 - 7.2 * len(after) - steps * wide
    canvas.text(x - 6, y + 12, text(low), "tick", "end")
    for i in range(steps):
        canvas.add(
            f'<rect x="{x + i * wide:.1f}" y="{y + 3:.1f}" width="{wide:.1f}" height="10" '
            f'class="c-cell tone-{tone}" fill-opacity="{0.06 + 0.94 * i / (steps - 1):.3f}"/>'
        )
    canvas.text(x + steps * wide + 6, y + 12, after, "tick")
