"""The figures in the docs are those of the benchmark's record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "forests.json"


@pytest.mark.skipif(not RESULTS.exists(), reason="no benchmark record")
def test_the_table_of_methods_is_the_record() -> None:
    record = json.loads(RESULTS.read_text())
    rows = (ROOT / "docs" / "forests.md").read_text().splitlines()
    for method in ("budgetprune", "budgetprune-filled", "greedy", "ccp", "lightgbm-lazy"):
        cells = next(r for r in rows if r.startswith(f"| `{method}` |")).split("|")[2:-1]
        shown = [float(cell.strip().replace("−", "-")) for cell in cells]
        found = []
        for kind in ("uniform", "heterogeneous"):
            entries = [e for name, e in record["sets"].items() if name.endswith(kind)]
            for budget in (0.2, 0.4, 0.6, 0.8, 1.0):
                at = entries[0]["budgets"].index(budget)
                lost = [
                    np.nanmean(np.array(e["scores"][method])[:, at] - np.array(e["unpruned"])[:, 0])
                    for e in entries
                ]
                found.append(100 * np.nanmean(lost))
        np.testing.assert_allclose(shown, found, atol=0.051)
