"""Charts are well-formed, escaped, described, and put things where they belong."""

from __future__ import annotations

import doctest
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.report import charts, words
from secateur.report.charts import Bar, Cell, Series

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert(1)</script>&"'
finite = st.floats(-1e6, 1e6, allow_nan=False)


def tree(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert root.find(f"{SVG}title") is not None
    assert root.find(f".//{SVG}script") is None
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("module", [charts, words])
def test_examples_in_docstrings(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0


@given(finite, finite)
def test_ticks_are_round_few_and_inside(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-3:
        return
    found = charts.ticks(low, high)
    slack = (high - low) * 1e-6
    assert all(low - slack <= t <= high + slack for t in found)
    assert 1 <= len(found) <= 12


@given(st.floats(1e-6, 1e6), st.floats(1.5, 1e6))
def test_log_ticks_are_inside(low: float, factor: float) -> None:
    found = charts.log_ticks(low, low * factor)
    assert found
    assert all(low * (1 - 1e-6) <= t <= low * factor * (1 + 1e-6) for t in found)


@settings(max_examples=40)
@given(st.lists(st.tuples(finite, finite), max_size=30), st.booleans(), st.sampled_from([320, 928]))
def test_any_line_stays_on_the_canvas(
    points: list[tuple[float, float]], log: bool, width: float
) -> None:
    svg = charts.line_chart(
        [Series("a", points)], title="t", x_label="x", y_label="y", width=width, log_y=log
    )
    for dot in tree(svg).iter(f"{SVG}circle"):
        assert -1 <= float(dot.get("cx", "nan")) <= width + 1
        assert -1 <= float(dot.get("cy", "nan")) <= 301


@given(st.floats(1e-3, 1e3), st.floats(1.0, 3.0), st.booleans())
def test_narrow_ranges_have_labels(low: float, factor: float, log: bool) -> None:
    points = [(0, low), (1, low * factor)]
    svg = charts.line_chart([Series("a", points)], title="t", x_label="x", y_label="y", log_y=log)
    assert len([t for t in tree(svg).iter(f"{SVG}text") if t.get("text-anchor") == "end"]) >= 1


def test_lines_rise_with_their_values() -> None:
    svg = charts.line_chart(
        [Series("a", [(0, 1), (1, 10), (2, 100)])], title="t", x_label="x", y_label="y", log_y=True
    )
    heights = [float(c.get("cy", "nan")) for c in tree(svg).iter(f"{SVG}circle")]
    assert heights[0] > heights[1] > heights[2]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_nan_points_are_left_out() -> None:
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)]
    svg = charts.line_chart([Series("a", points)], title="t", x_label="x", y_label="y")
    assert len(list(tree(svg).iter(f"{SVG}circle"))) == 2
    assert "nan" not in svg


def test_bars_are_in_proportion_and_whiskers_fit() -> None:
    svg = charts.bar_chart([Bar("a", 10), Bar("b", 20, "20", 15, 30)], title="t", width=400)
    root = tree(svg)
    one, two = (float(r.get("width", "nan")) for r in root.iter(f"{SVG}rect"))
    assert two == pytest.approx(2 * one, abs=0.2)
    assert all(float(x.get("x2", "nan")) <= 400 for x in root.iter(f"{SVG}line"))


def test_heat_map_fills_by_value_and_marks_alerts() -> None:
    cells = [[Cell(0.0, "empty"), Cell(1.0, NASTY, alert=True)], [None, Cell(0.5)]]
    svg = charts.heat_map(["q", "k"], ["0", "1"], cells, title="t", low=0, high=1)
    found = [r for r in tree(svg).iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert [float(r.get("fill-opacity", "nan")) for r in found] == [0.06, 1.0, 0.53]
    assert [("c-alert" in r.get("class", "")) for r in found] == [False, True, False]


def test_histogram_stacks_and_shows_the_threshold() -> None:
    svg = charts.histogram([0, 1, 2], [1, 3], [2, 0], title="t", x_label="x", threshold=1.0)
    root = tree(svg)
    assert "threshold" in texts(root)
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("height") != "10"]
    assert len(bars) == 3


@pytest.mark.parametrize("kind", ["line", "bar", "heat", "histogram"])
def test_names_are_escaped(kind: str) -> None:
    svg = {
        "line": lambda: charts.line_chart(
            [Series(NASTY, [(0, 1)], [(0, 1, NASTY)]), Series("b", [(1, 2)])],
            title=NASTY, x_label=NASTY, y_label=NASTY, reference=(1.0, NASTY), description=NASTY,
        ),
        "bar": lambda: charts.bar_chart([Bar(NASTY, 1, NASTY)], title=NASTY),
        "heat": lambda: charts.heat_map(
            [NASTY], [NASTY], [[Cell(1, NASTY)]], title=NASTY, low=0, high=1, x_label=NASTY
        ),
        "histogram": lambda: charts.histogram([0, 1], [1], [1], title=NASTY, x_label=NASTY),
    }[kind]()  # fmt: skip
    assert tree(svg).get("aria-label") == NASTY


def test_standalone_carries_its_colours() -> None:
    svg = charts.standalone(charts.bar_chart([Bar("a", 1)], title="t"))
    tree(svg)
    assert "--green" in svg


def test_marks_of_points_that_lie_close_do_not_run_into_each_other() -> None:
    points = [Series("a", [(0.304, 1.0), (0.509, 0.5)]), Series("b", [(0.308, 0.9), (0.503, 0.4)])]
    svg = charts.line_chart(
        points, title="t", x_label="x", y_label="y", x_text=lambda x: f"{x:.0%}"
    )
    marks = [t for t in tree(svg).iter(f"{SVG}text") if (t.text or "").endswith("%")]
    places = sorted(float(t.get("x", "nan")) for t in marks)
    assert len(places) >= 2
    assert all(right - left >= 36 for left, right in pairwise(places))
