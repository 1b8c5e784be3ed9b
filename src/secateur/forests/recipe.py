"""What a forest run is asked for: the command line, a YAML file and Python say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from secateur.errors import UsageError


class ForestRecipe(BaseModel):
    """A forest to grow, what its features cost, and how to prune it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path
    target: str | None = None
    task: Literal["auto", "classification", "regression"] = "auto"
    costs: Path | None = None
    budget: float | None = Field(None, ge=0, allow_inf_nan=False)
    lam: float | None = Field(None, ge=0, allow_inf_nan=False)
    fill: Literal["hull", "greedy"] = "hull"
    kind: Literal["random-forest", "extra-trees"] = "random-forest"
    trees: int = Field(100, ge=1)
    error_source: Literal["validation", "oob", "train", "both"] = "validation"
    node_loss: Literal["auto", "error", "gini", "brier", "log", "squared"] = "auto"
    cost_scope: Literal["example", "model"] = "example"
    solver: Literal["auto", "maxflow", "ortools", "push_relabel", "primal_dual", "lp"] = "auto"
    validation: float = Field(0.25, gt=0, lt=1, description="share of the data that prunes")
    test: float = Field(0.25, gt=0, lt=1, description="share of the data that only measures")
    points: int | None = Field(30, ge=2, description="points of the path; None for all")
    seed: int = Field(0, ge=0, lt=2**32)
    jobs: int = Field(1, description="threads; -1 for all")

    @field_validator("jobs")
    @classmethod
    def _some_jobs(cls, jobs: int) -> int:
        if jobs == 0:
            raise ValueError("0 threads do no work; give 1 or more, or -1 for all")
        return jobs


def read_yaml(path: Path, field: str) -> Any:
    """What a YAML file holds.

    Raises:
        UsageError: it is no YAML, naming ``field``.
    """
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        words = " ".join(str(error).split())
        raise UsageError(
            f"cannot be read as YAML: {words}", field=field, value=str(path)
        ) from error


def read_recipe(path: Path | None, flags: dict[str, Any]) -> ForestRecipe:
    """A recipe from YAML, with ``flags`` on top.

    Raises:
        UsageError: an unknown field or a value out of range; names it.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not path.exists():
            raise UsageError("no such file", field="recipe", value=str(path))
        values = read_yaml(path, "recipe") or {}
        if not isinstance(values, dict):
            raise UsageError("a recipe maps fields to values", field="recipe", value=str(path))
    values |= flags
    try:
        recipe = ForestRecipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(ForestRecipe.model_fields)
        fix = f"known fields: {known}" if first["type"] == "extra_forbidden" else None
        raise UsageError(
            first["msg"].lower(), field=name, value=first.get("input"), fix=fix
        ) from error
    if recipe.test + recipe.validation >= 1:
        raise UsageError(
            "validation and test leave nothing to train on", field="test", value=recipe.test
        )
    return recipe
