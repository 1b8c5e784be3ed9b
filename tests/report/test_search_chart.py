"""The chart of a search: valid, complete, and silent about what did not happen."""

import xml.dom.minidom

from secateur.allocation.search.engine import trace
from secateur.report.search_chart import of_run, search_chart, standalone


def history():
    inf = float("inf")
    rows = [(3.0, True), (2.0, False), (inf, True), (2.5, True), (2.7, True), (1.5, True)]
    best, out = inf, []
    for n, (value, full) in enumerate(rows):
        best = min(best, value) if full else best
        out.append({"n": n, "value": value, "full": full, "best": best, "candidate": f"<c{n}>"})
    return out


def record(**changes):
    base = {"space": "dsa", "model": "a & b", "target": "0.7", "fitness": "kl", "start": 3.0}
    return {**base, "history": history(), **changes}


def test_chart_is_valid_and_names_improvements():
    text = standalone(search_chart(record()))
    xml.dom.minidom.parseString(text)
    assert text.count("c-mark") >= 5 + 3 - 1  # in full but the infinite one, and improvements
    assert "&lt;c5&gt;" in text
    assert "&lt;c4&gt;" not in text  # no improvement
    assert "uniform" in text


def test_trace_keeps_what_is_drawn():
    kept = trace(history())
    assert [line["n"] for line in kept] == [0, 2, 3, 4, 5]
    assert [line["n"] for line in kept if "candidate" in line] == [0, 3, 5]
    once = record(history=kept)
    assert of_run({"allocation": {"provenance": {"search": once}}}) is not None
    assert of_run({"allocation": {"provenance": {"made_by": {"search": once}}}}) is not None
    assert of_run({"allocation": {"provenance": {"allocator": "owl"}}}) is None
    assert of_run({}) is None


def test_nothing_finite_is_still_a_chart():
    lines = [{"n": 0, "value": float("inf"), "full": True, "best": float("inf"), "candidate": "c"}]
    xml.dom.minidom.parseString(str(search_chart(record(history=lines, start=float("inf")))))
