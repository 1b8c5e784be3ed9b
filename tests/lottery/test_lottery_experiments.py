"""The experiments' figures, in their quick form, and the growth laws they show."""

import itertools
import json

import numpy as np
import pytest

from secateur.lottery.experiments import experiments
from secateur.lottery.experiments.base import fit_line, wilson
from secateur.lottery.experiments.growth import _single
from secateur.lottery.log_ticket import LogTicket
from secateur.lottery.malach import hit_probability
from secateur.lottery.report import describe, write_experiment, write_ticket_page
from secateur.progress import SILENT


@pytest.fixture(scope="module")
def growth():
    return experiments["growth"](True, 1, SILENT)


def check_pages(name, result, folder):
    assert result.findings
    assert all(len(row) == len(t.columns) for t in result.tables for row in t.rows)
    paths = write_experiment(result, folder, name, "secateur lottery experiment")
    assert json.loads(paths[1].read_text())["findings"]
    assert "<svg" in paths[0].read_text()
    assert all(p.read_text().startswith("<svg") for p in paths[2:])


def test_growth_writes_its_page(growth, tmp_path):
    check_pages("growth", growth, tmp_path)


def test_success_stays_below_delta(tmp_path):
    result = experiments["success"](True, 1, SILENT)
    check_pages("success", result, tmp_path)
    full = [r for r in result.record["rows"] if r["fraction"] == 1]
    assert all(r["low"] <= r["delta"] for r in full)
    starved = [r for r in result.record["rows"] if r["fraction"] < 0.5]
    assert sum(r["failures"] for r in starved) > sum(r["failures"] for r in full)


def test_layouts_need_what_their_order_says(tmp_path):
    result = experiments["pools"](True, 1, SILENT)
    check_pages("pools", result, tmp_path)
    means = {c["name"]: [p["mean"] for p in c["points"]] for c in result.record["constructions"]}
    order = ("subset sum", "log, matching", "log, shared", "log, independent")
    for fewer, more in itertools.pairwise(order):
        assert all(a < b for a, b in zip(means[fewer], means[more], strict=True))
    for kind in ("independent", "shared", "batch"):
        points = next(
            c["points"] for c in result.record["constructions"] if c["name"] == f"log, {kind}"
        )
        assert all(p["largest"] <= p["bound"] for p in points)


def test_popup_beats_random_masks(tmp_path):
    pytest.importorskip("sklearn")
    result = experiments["popup"](True, 1, SILENT)
    check_pages("popup", result, tmp_path)
    half = next(m for m in result.record["means"] if m["keep"] == 0.5)
    assert half["trained"] > half["random"] + 0.4


def test_growth_laws(growth):
    """Logarithms are straight in log(1/eps); one product needs 1/eps; the wrong law a power."""
    laws = {c["name"]: c for c in growth.record["constructions"]}
    for each in ("log, golden ratio", "log, base 3/2", "subset sum"):
        assert laws[each]["linear_in_log"]["r_squared"] > 0.97
        assert laws[each]["power_law"]["slope"] < 0.35
    assert laws["one product (Malach)"]["power_law"]["slope"] == pytest.approx(1, abs=0.15)
    assert laws["two factors (Malach)"]["power_law"]["slope"] == pytest.approx(2, abs=0.3)
    assert laws["log, uniform weights"]["power_law"]["slope"] > 0.5
    for case in laws.values():
        for point in case["points"]:
            assert point["bound"] is None or point["mean"] <= point["bound"]


def test_pools_grow_with_the_logarithm(digits_net):
    """B6: pool size against log10(1/eps), R² > 0.99; the parameters likewise."""
    decades = np.arange(1, 9)
    sizes = [LogTicket(weight_eps=10.0**-d).estimate(digits_net) for d in decades]
    assert fit_line(decades, [s.pool[0] for s in sizes]).r_squared > 0.99
    assert fit_line(decades, [s.random for s in sizes]).r_squared > 0.99


def test_single_products_need_one_over_eps():
    """B6: log-log slope 1, and the closed form agrees with what is drawn."""
    eps = [0.1, 0.03, 0.01, 0.003]
    w = np.full(300, 0.5)
    means = [_single(False)(w, e, 3).mean() for e in eps]
    line = fit_line(np.log10(1 / np.array(eps)), np.log10(means))
    assert line.slope == pytest.approx(1, abs=0.1)
    for e, mean in zip(eps, means, strict=True):
        assert mean == pytest.approx(1 / hit_probability(0.5, e, 2**0.5), rel=0.25)


def test_lines_and_intervals():
    line = fit_line([0, 1, 2, 3], [1, 3, 5, 7])
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((2, 1, 1))
    assert line.low <= 2 <= line.high
    low, high = wilson(0, 100)
    assert low == 0 < high < 0.05
    assert wilson(0, 0) == (0, 1)


def test_a_tickets_page(small_net, tmp_path):
    from secateur.lottery import certify

    ticket = LogTicket(weight_eps=0.01).fit(small_net)
    certificate = certify(ticket, starts=2, samples=8)
    write_ticket_page(ticket, certificate, tmp_path / "t.html", "secateur lottery find <x>")
    page = (tmp_path / "t.html").read_text()
    assert f"{certificate.bound:.4g}" in page
    assert "&lt;x&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "our own re-derivation" in " ".join(describe(ticket, certificate).findings)
