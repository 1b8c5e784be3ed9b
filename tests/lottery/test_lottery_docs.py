"""The figures in docs/lottery.md are those of the benchmarks' records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results"


def rows_of(name: str) -> list[list[str]]:
    """Cells of all table rows in docs/lottery.md whose first cell is ``name``."""
    lines = (ROOT / "docs" / "lottery.md").read_text().splitlines()
    return [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith(f"| {name} |")
    ]


def record(name: str) -> dict:
    file = RECORDS / f"lottery-{name}.json"
    if not file.exists():
        pytest.skip("no benchmark record")
    return json.loads(file.read_text())


def test_sizes_are_the_record() -> None:
    for row in record("sizes")["rows"]:
        if row["weight_eps"] != 1e-2:
            continue
        shown = [
            cells for cells in rows_of(row["construction"]) if cells[0] == f"{row['neurons']:,}"
        ]
        assert len(shown) == 1, row["construction"]
        assert shown[0][3] == f"{row['bytes']:,}"
        assert shown[0][5] == f"{row['bound']:.3g}"
        assert shown[0][6] == ("" if row["zonotope"] is None else f"{row['zonotope']:.3g}")
        assert shown[0][7] == f"{row['empirical']:.3g}"


def test_pool_sizes_are_the_record() -> None:
    for row in record("pools")["constructions"]:
        line = row["linear_in_log"]
        growth = f"{line['slope']:+.2f} [{line['low']:.2f}, {line['high']:.2f}]"
        shown = [cells for cells in rows_of(row["name"]) if cells[0] == growth]
        assert len(shown) == 1, row["name"]
        at = {round(-math.log10(point["eps"]), 1): point["mean"] for point in row["points"]}
        assert shown[0][2:4] == [f"{at[3]:.1f}", f"{at[5]:.1f}"]
