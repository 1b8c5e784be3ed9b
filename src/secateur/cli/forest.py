"""Prune random forests to a feature budget (BudgetPrune), exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.forests.recipe import ForestRecipe

NAME = "forest"

app = typer.Typer(name=NAME, help=__doc__, no_args_is_help=True, rich_markup_mode="rich")

Data = Annotated[Path | None, typer.Argument(help=".csv, .parquet or .svmlight")]
Target = Annotated[str | None, typer.Option(help="column to predict")]
Costs = Annotated[
    Path | None, typer.Option(help=".csv (feature,cost[,group]) or .yaml; default: 1 each")
]
Task = Annotated[str | None, typer.Option(help="auto, classification or regression")]
Kind = Annotated[str | None, typer.Option(help="random-forest or extra-trees")]
Trees = Annotated[int | None, typer.Option(help="how many")]
Source = Annotated[str | None, typer.Option(help="validation, oob, train or both")]
Loss = Annotated[str | None, typer.Option(help="error, gini, brier, log or squared")]
CostScope = Annotated[str | None, typer.Option(help="example (per example) or model")]
Solver = Annotated[str | None, typer.Option(help="auto, ortools, push_relabel, primal_dual or lp")]
Seed = Annotated[int | None, typer.Option(help="of the split and of the forest")]
Jobs = Annotated[int | None, typer.Option(help="threads; -1 for all")]
Recipe = Annotated[Path | None, typer.Option(help="YAML with the same fields; flags go on top")]
Points = Annotated[int | None, typer.Option(help="optimal prunings to find; 0 for all")]


@app.command("prune")
def prune(
    data: Data = None,
    target: Target = None,
    costs: Costs = None,
    budget: Annotated[
        float | None, typer.Option(help="most that an average example may pay")
    ] = None,
    lam: Annotated[float | None, typer.Option(help="price of a cost unit, in error")] = None,
    fill: Annotated[
        str | None, typer.Option(help="between optimal prunings: hull (stop) or greedy")
    ] = None,
    task: Task = None,
    kind: Kind = None,
    trees: Trees = None,
    error_source: Source = None,
    node_loss: Loss = None,
    cost_scope: CostScope = None,
    solver: Solver = None,
    points: Points = None,
    seed: Seed = None,
    jobs: Jobs = None,
    recipe: Recipe = None,
    out: common.Out = Path("forest-out"),
    as_json: common.Json = False,
) -> None:
    """Grow a forest, prune it to a budget or a lambda, measure it on rows kept aside.

    Writes forest.npz (read it with secateur.forests.load_forest), result.json and report.html.

    [bold]Examples[/bold]

      secateur forest prune data.csv --target y --costs costs.csv --budget 12.5

      secateur forest prune data.parquet --target y --lam 0.005 --error-source oob --json

      secateur forest prune --recipe forest.yaml --out pruned
    """
    from secateur.forests.workflow import run_prune

    asked = _recipe(
        recipe, points, data=data, target=target, costs=costs, budget=budget, lam=lam,
        fill=fill, task=task,
        kind=kind, trees=trees, error_source=error_source, node_loss=node_loss,
        cost_scope=cost_scope, solver=solver, seed=seed, jobs=jobs,
    )  # fmt: skip
    record = run_prune(asked, out, common.progress(as_json))
    if as_json:
        common.emit(record | {"out": str(out)})
        return
    before, after, optimum = record["before"], record["after"], record["optimum"]
    common.say(f"{'':18}{'unpruned':>12}{'pruned':>12}   ({record['rows']['test']} test rows)")
    for label, key, form in (
        (record["score"], "score", ".4f"),
        ("mean cost", "cost", ".4g"),
        ("features a row", "features_per_example", ".2f"),
        ("nodes", "nodes", "d"),
    ):
        common.say(f"{label:18}{before[key]:>12{form}}{after[key]:>12{form}}")
    common.say(
        f"objective {optimum['objective']:.6g}, proved within {optimum['gap']:.1e} of the optimum "
        f"({optimum['solver']})"
    )
    if optimum.get("neighbours"):
        common.say(_budget_words(optimum, asked.budget))
    common.say(f"written: {out / 'forest.npz'}, {out / 'report.html'}")


@app.command("path")
def path(
    data: Data = None,
    target: Target = None,
    costs: Costs = None,
    points: Points = None,
    task: Task = None,
    kind: Kind = None,
    trees: Trees = None,
    error_source: Source = None,
    node_loss: Loss = None,
    cost_scope: CostScope = None,
    solver: Solver = None,
    seed: Seed = None,
    jobs: Jobs = None,
    recipe: Recipe = None,
    out: common.Out = Path("forest-path"),
    as_json: common.Json = False,
) -> None:
    """All optimal prunings, from the cheapest to the most accurate, with test figures.

    [bold]Example[/bold]

      secateur forest path data.csv --target y --costs costs.yaml --points 0
    """
    from secateur.forests.workflow import run_path

    asked = _recipe(
        recipe, points, data=data, target=target, costs=costs, task=task, kind=kind, trees=trees,
        error_source=error_source, node_loss=node_loss, cost_scope=cost_scope, solver=solver,
        seed=seed, jobs=jobs,
    )  # fmt: skip
    record = run_path(asked, out, common.progress(as_json))
    if as_json:
        common.emit(record | {"out": str(out)})
        return
    score = record["score"]
    common.say(
        f"{'below lambda':>14}{'tree error':>12}{'cost':>10}{'test ' + score:>16}{'cost':>10}"
    )
    for row in record["path"]:
        common.say(
            f"{row['lam']:>14.4g}{row['error']:>12.5f}{row['cost']:>10.4g}"
            f"{row['test_score']:>16.4f}{row['test_cost']:>10.4g}"
        )
    some = "all of them" if record["complete"] else "the most telling ones; --points 0 for all"
    common.say(f"{len(record['path'])} optimal prunings, {some}; written: {out / 'report.html'}")


@app.command("compare")
def compare(
    data: Data = None,
    target: Target = None,
    costs: Costs = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="repeat; default: those always there")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="splits and forests")] = 3,
    task: Task = None,
    kind: Kind = None,
    trees: Trees = None,
    jobs: Jobs = None,
    recipe: Recipe = None,
    out: common.Out = Path("forest-compare"),
    as_json: common.Json = False,
) -> None:
    """BudgetPrune and its baselines on the same forests: score within a budget, several seeds.

    [bold]Example[/bold]

      secateur forest compare data.csv --target y -m budgetprune -m greedy -m ccp --seeds 5
    """
    from secateur.forests.workflow import run_compare

    asked = _recipe(
        recipe, None, data=data, target=target, costs=costs, task=task, kind=kind, trees=trees,
        jobs=jobs,
    )  # fmt: skip
    record = run_compare(
        asked, out, methods=methods, seeds=seeds, progress=common.progress(as_json)
    )
    if as_json:
        common.emit(record | {"out": str(out)})
        return
    common.say("share of full cost".ljust(20) + "".join(f"{b:>8.0%}" for b in record["budgets"]))
    for row in record["table"]:
        common.say(row["method"].ljust(20) + "".join(f"{v:>8.4f}" for v in row["mean"]))
    for name, reason in record["left_out"].items():
        common.say(f"{name}: left out, {reason}")
    common.say(f"mean {record['score']} on test rows; written: {out / 'report.html'}")


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="a forest run's folder")],
    as_json: common.Json = False,
) -> None:
    """Write (again) the page of a forest run; print where it lies.

    [bold]Example[/bold]

      secateur forest report forest-out
    """
    from secateur.forests.report import read_record, write_forest_report

    written = write_forest_report(read_record(folder), folder)
    if as_json:
        common.emit({"html": str(written)})
    else:
        common.say(str(written))


def _recipe(recipe: Path | None, points: int | None, **flags: Any) -> ForestRecipe:
    from secateur.forests.recipe import read_recipe

    asked = common.given(**flags)
    if points is not None:
        asked["points"] = points or None
    return read_recipe(recipe, asked)


def _budget_words(optimum: dict[str, Any], budget: float | None) -> str:
    above = optimum["neighbours"][1]
    words = f"budget {budget:g}: the pruning examples pay {optimum['cost']:.4g} on average"
    if above is None:
        return words + ", and no optimal pruning costs more"
    return words + (
        f"; the next optimal pruning costs {above['cost']:.4g} (only points on the convex hull of "
        "cost and error are optimal for some lambda)"
    )
