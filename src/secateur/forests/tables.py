"""Reading data and prices from files, with errors that name the column and the fix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from secateur.forests.checks import ForestInputError
from secateur.forests.recipe import read_yaml

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
    try:
        frame, labels = _read(path, kind)
    except (ValueError, pd.errors.ParserError, OSError) as error:
        raise ForestInputError(
            f"cannot be read as {kind}: {str(error).strip()}", field="data", value=str(path)
        ) from error
    if len(frame) == 0:
        raise ForestInputError("has no rows", field="data", value=str(path))
    if labels is not None:
        return Table(_numbers(frame), labels.to_numpy(), _classify(labels, task))
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
    return Table(_numbers(frame), labels.to_numpy(), _classify(labels, task))


def _read(path: Path, kind: str) -> tuple[pd.DataFrame, pd.Series | None]:
    """The table, and the targets where the format keeps them apart."""
    if kind == "csv":
        return pd.read_csv(path), None
    if kind == "parquet":
        return pd.read_parquet(path), None
    from sklearn.datasets import load_svmlight_file

    matrix, y = load_svmlight_file(str(path))
    names = [f"x{i + 1}" for i in range(matrix.shape[1])]
    return pd.DataFrame(matrix.toarray(), columns=names), pd.Series(y)


def _numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """The features in float32; columns of words, and infinities, are named."""
    if frame.shape[1] == 0:
        raise ForestInputError("there is no feature besides the target", field="data")
    for name, column in frame.items():
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            raise ForestInputError(
                f"this column holds words ({column.iloc[0]!r}); trees need numbers",
                field="data",
                value=str(name),
                fix="encode it (pandas.get_dummies, OrdinalEncoder) or drop it",
            )
    with np.errstate(over="ignore"):
        small = frame.astype(np.float32)
    if (wrong := np.isinf(small.to_numpy())).any():
        row, column_number = np.argwhere(wrong)[0].tolist()
        raise ForestInputError(
            f"row {row + 1} is infinite, or too large for float32",
            field="data",
            value=str(frame.columns[column_number]),
            fix="leave the value out (missing values are understood), or scale the column",
        )
    return small


def _classify(labels: pd.Series, task: str) -> bool:
    if task not in ("auto", "classification", "regression"):
        raise ForestInputError(
            "unknown", field="task", value=task, fix="auto, classification or regression"
        )
    if labels.nunique() < 2:
        raise ForestInputError(
            "every row has the same target; there is nothing to learn",
            field="target",
            value=str(labels.iloc[0]),
        )
    numeric = pd.api.types.is_numeric_dtype(labels)
    if task == "regression" and not numeric:
        raise ForestInputError(
            f"the targets are words ({labels.iloc[0]!r}); regression needs numbers",
            field="task",
            value=task,
        )
    if task == "classification" or not numeric:
        return True
    if np.isinf(labels.to_numpy(dtype=np.float64)).any():
        raise ForestInputError("targets must be finite", field="target", value=labels.name)
    whole = bool((labels == labels.round()).all())
    return task == "auto" and whole and labels.nunique() <= MOST_CLASSES


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
        try:
            frame = pd.read_csv(path, dtype={"feature": str})
        except (ValueError, pd.errors.ParserError, OSError) as error:
            raise ForestInputError(
                f"cannot be read as csv: {str(error).strip()}", field="costs", value=str(path)
            ) from error
        if not {"feature", "cost"} <= set(frame.columns):
            raise ForestInputError(
                "needs the columns feature and cost", field="costs", value=str(path)
            )
        twice = frame["feature"][frame["feature"].duplicated()]
        if len(twice):
            raise ForestInputError(
                f"{path.name} prices it twice", field="feature", value=str(twice.iloc[0])
            )
        entries: dict[str, Any] = {
            str(row["feature"]): row for row in frame.to_dict(orient="records")
        }
    elif path.suffix.lower() in (".yaml", ".yml"):
        entries = read_yaml(path, "costs") or {}
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
    if unknown := [name for name in entries if name not in names]:
        raise ForestInputError(
            f"{path.name} prices it, but the data have no such column",
            field="feature",
            value=unknown[0],
            fix=f"known columns: {', '.join(names[:8])}" + (", ..." if len(names) > 8 else ""),
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
        price = float(value)
    except (TypeError, ValueError):
        raise ForestInputError(
            f"the price of '{name}' is no number", field="costs", value=value
        ) from None
    if not (np.isfinite(price) and price >= 0):
        raise ForestInputError(
            f"the price of '{name}' must be a finite number, 0 or more", field="costs", value=value
        )
    return price
