"""Comparisons: one protocol, a line per method, the best marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.errors import UsageError
from secateur.report import write_comparison

Make = Callable[..., dict[str, Any]]


def test_page_and_card(comparison: dict[str, Any], parse: Any, tmp_path: Path) -> None:
    paths = write_comparison(comparison, tmp_path)
    html = paths["html"].read_text("utf-8")
    page = parse(html)
    assert {"plot", "table", "reproduce"} <= set(page.ids)
    assert html.count("<polyline") == 2 * 2 * 4  # perplexity and KL, wide and narrow
    assert html.count('class="best"') == 4
    assert "At 2:4, sparsegpt+best is best with 47.90" in page.text
    markdown = paths["markdown"].read_text("utf-8")
    assert yaml.safe_load(markdown.split("---\n", 2)[1])["tags"][0] == "secateur"
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1


def run(result: Make, method: str, sparsity: float, perplexity: float) -> dict[str, Any]:
    one = result(blocks=1)
    one["recipe"] |= {"method": method, "update": None}
    one["totals"]["asked"] = sparsity
    one["quality"]["pruned"]["perplexity"] = perplexity
    return one


def test_several_runs_become_one_table(result: Make, parse: Any, tmp_path: Path) -> None:
    runs = [run(result, m, s, 30 + s + i) for i, m in enumerate("ab") for s in (0.5, 0.6)]
    page = parse(write_comparison(runs, tmp_path)["html"].read_text("utf-8"))
    assert "2 methods compared at 0.5, 0.6" in page.text
    assert "At 0.5, a is best with 30.50" in page.text


def test_gaps_are_left_blank(comparison: dict[str, Any], parse: Any, tmp_path: Path) -> None:
    del comparison["perplexity"]["wanda"]["0.7"]
    comparison["perplexity"]["magnitude"]["0.7"] = float("inf")
    for key in ("stderr", "kl", "top1_agreement", "calibration", "command"):
        del comparison[key]
    page = parse(write_comparison(comparison, tmp_path)["html"].read_text("utf-8"))
    assert page.text.count("–") == 2


def test_other_protocols_are_refused(result: Make, tmp_path: Path) -> None:
    other = run(result, "b", 0.5, 31)
    other["quality"]["protocol"] = {"digest": "deadbeef"}
    with pytest.raises(UsageError, match=r"different protocols .*deadbeef"):
        write_comparison([run(result, "a", 0.5, 30), other], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_compare(result: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        write_comparison([], tmp_path)
    with pytest.raises(UsageError, match="not measured"):
        write_comparison([result(blocks=1, quality=None)], tmp_path)
