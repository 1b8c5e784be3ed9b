"""Reading data and prices from files, with errors that name the column and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from secateur.forests.checks import ForestInputError

READERS = {".csv": "csv", ".parquet": "parquet", ".svm": "svmlight", ".svmlight": "svmlight"}
MOST_CLASSES = 50


@dataclass(frozen=True)
class Table:
    """Features with names (n, d), targets (n,), and whether the task is classification."""

    x: pd.DataFrame
    y: NDArray
    classify: bool

    @property
    def names(self) -> list[str]:
        """The features' names."""
        return [str(name) for name in self.x.columns]


def read_table(path: Path, target: str | None, task: str = "auto") -> Table:
    """Read ``.csv``, ``.parquet`` or ``.svm``/``.svmlight``.

    Args:
        target: the column to predict; svmlight carries it already.
        task: ``classification``, ``regression``, or ``auto``: numbers with a fraction, or with
            more than 50 values, are regression.

    Raises:
        ForestInputError: no such file, kind or column; a feature that is not a number; an
            example without a target.
    """
    path = Path(path)
    if not path.exists():
        raise ForestInputError("no such file", field="data", value=str(path))
    kind = READERS.get(path.suffix.lower())
    if kind is None:
        raise ForestInputError(
            "unknown kind of file",
            field="data",
            value=str(path),
            fix=f"one of {', '.join(READERS)}",
        )
    if kind == "svmlight":
        from sklearn.datasets import load_svmlight_file

        matrix, y = load_svmlight_file(str(path))
        x = pd.DataFrame(
            matrix.toarray().astype(np.float32),
            columns=[f"x{i + 1}" for i in range(matrix.shape[1])],
        )
        return Table(x, y, _classify(pd.Series(y), task))
    frame = pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)
    if target is None or target not in frame.columns:
        raise ForestInputError(
            "no such column",
            field="target",
            value=target,
            fix=f"one of: {', '.join(map(str, frame.columns[-8:]))}",
        )
    labels = frame.pop(target)
    if labels.isna().any():
        raise ForestInputError(
            f"{int(labels.isna().sum())} rows have no target; leave them out",
            field="target",
            value=target,
        )
    for name, column in frame.items():
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            raise ForestInputError(
                f"this column holds words ({column.iloc[0]!r}); trees need numbers",
                field="data",
                value=str(name),
                fix="encode it (pandas.get_dummies, OrdinalEncoder) or drop it",
            )
    return Table(frame.astype(np.float32), labels.to_numpy(), _classify(labels, task))


def _classify(labels: pd.Series, task: str) -> bool:
    if task not in ("auto", "classification", "regression"):
        raise ForestInputError(
            "unknown", field="task", value=task, fix="auto, classification or regression"
        )
    if task != "auto":
        return task == "classification"
    if not pd.api.types.is_numeric_dtype(labels):
        return True
    whole = bool((labels == labels.round()).all())
    return whole and labels.nunique() <= MOST_CLASSES


def read_costs(path: Path | None, names: list[str]) -> tuple[dict[str, float] | None, list | None]:
    """Prices and groups for ``BudgetPruner``.

    A CSV has columns ``feature``, ``cost`` and, if wanted, ``group``. A YAML file maps features to
    a price, or to ``{cost: 5, group: sensor1}``.

    Returns:
        ``feature_costs`` by name, and a label for each of ``names`` (None without groups).

    Raises:
        ForestInputError: a feature is missing, unknown, or has no number for a price.
    """
    if path is None:
        return None, None
    path = Path(path)
    if not path.exists():
        raise ForestInputError("no such file", field="costs", value=str(path))
    if path.suffix.lower() == ".csv":
        frame = pd.read_csv(path, dtype={"feature": str})
        if not {"feature", "cost"} <= set(frame.columns):
            raise ForestInputError(
                "needs the columns feature and cost", field="costs", value=str(path)
            )
        entries: dict[str, Any] = {
            str(row["feature"]): row for row in frame.to_dict(orient="records")
        }
    elif path.suffix.lower() in (".yaml", ".yml"):
        entries = yaml.safe_load(path.read_text()) or {}
        if not isinstance(entries, dict):
            raise ForestInputError("must map features to prices", field="costs", value=str(path))
        entries = {str(name): entry for name, entry in entries.items()}
    else:
        raise ForestInputError("must be .csv or .yaml", field="costs", value=str(path))
    for name in names:
        if name not in entries:
            raise ForestInputError(
                f"{path.name} has no price for it", field="feature", value=name, fix="0 if free"
            )
    prices = {name: _price(name, entries[name]) for name in entries}
    group = {name: entry.get("group") for name, entry in entries.items() if isinstance(entry, dict)}
    if not any(isinstance(label, str | int) for label in group.values()):
        return prices, None
    # A feature without a group stands alone, under its own name.
    labels = [group.get(name) for name in names]
    return prices, [
        str(label) if isinstance(label, str | int) else name
        for name, label in zip(names, labels, strict=True)
    ]


def _price(name: str, entry: Any) -> float:
    value: Any = entry.get("cost") if isinstance(entry, dict) else entry
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ForestInputError(
            f"the price of '{name}' is no number", field="costs", value=value
        ) from None
