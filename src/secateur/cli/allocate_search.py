"""Search how much to take from each block, by trying plans on a text never measured on.

Writes found.json (a function of scores, for [cyan]--allocation dsa -A preset=DIR/found.json[/cyan]
on this and other models), plan.json, search.json and search.svg.
Run the same command again after a crash or Ctrl-C: it goes on where it stopped; with a larger
--budget a finished search goes on too.

[bold]Examples[/bold]

  secateur allocate search demo --method wanda --sparsity 0.7 --budget 100 --out search

  secateur allocate search ./model -s 0.6 --space ratios --workers 4 --out search

  secateur allocate search ./model -s 0.6 --executor ray --workers 8 --address auto --out search
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "search"


def command(
    model: common.ModelArgument,
    out: common.Out,
    sparsity: common.Sparsity = None,
    method: common.MethodName = None,
    pattern: common.Pattern = None,
    scope: common.Scope = None,
    space: Annotated[
        str, typer.Option(help="dsa: functions of scores; ratios: a ratio for each block")
    ] = "dsa",
    budget: Annotated[int, typer.Option(help="distinct plans tried")] = 100,
    population: Annotated[int, typer.Option(help="plans kept to breed from")] = 20,
    offspring: Annotated[int, typer.Option(help="plans of one generation, tried in parallel")] = 8,
    search_seed: Annotated[int, typer.Option(help="fixes the whole search")] = 0,
    first: Annotated[
        int | None, typer.Option(help="windows of the first, cheap look; default a quarter")
    ] = None,
    fitness: Annotated[str | None, typer.Option(help="kl or perplexity")] = None,
    search_text: Annotated[
        str | None, typer.Option(help="text plans are tried on; default: the calibration's")
    ] = None,
    search_samples: Annotated[int | None, typer.Option(help="its sequences")] = None,
    search_length: Annotated[int | None, typer.Option(help="tokens in each")] = None,
    calibration: common.CalibrationText = None,
    samples: common.Samples = None,
    length: common.Length = None,
    seed: common.Seed = None,
    eval_text: Annotated[
        str | None, typer.Option(help="text you will measure on: the search's must not touch it")
    ] = None,
    eval_windows: Annotated[int | None, typer.Option(help="how many windows of it")] = None,
    executor: Annotated[
        str | None, typer.Option(help="serial, processes or ray; by default as --workers says")
    ] = None,
    workers: Annotated[int, typer.Option(help="evaluators at a time, each with a model")] = 1,
    address: Annotated[str | None, typer.Option(help="of a running Ray cluster")] = None,
    option: common.Options = None,
    allocation_option: Annotated[
        list[str] | None,
        typer.Option(
            "--allocation-option",
            "-A",
            help="NAME=VALUE: lam, scores, min_sparsity, max_sparsity",
        ),
    ] = None,
    include: common.Include = None,
    exclude: common.Exclude = None,
    blocks: common.Blocks = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    trust_remote_code: common.TrustRemoteCode = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="throw an earlier search in DIR away")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """What the command does; its help is the module's docstring."""
    from secateur.allocation.search.engine import SearchSettings
    from secateur.recipe import Recipe
    from secateur.run.plan_search import Workers, search_plan

    recipe = Recipe.build(
        {
            **common.given(
                model=model,
                sparsity=sparsity,
                method=method,
                pattern=pattern,
                scope=scope,
                options=common.read_options(option),
                include=include,
                exclude=exclude,
                blocks=blocks,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code or None,
            ),
            "allocation": {"name": "dsa", **(common.read_options(allocation_option) or {})},
            "calibration": common.given(
                text=calibration, samples=samples, length=length, seed=seed
            ),
            "search": common.given(
                text=search_text, samples=search_samples, length=search_length, fitness=fitness
            ),
            "evaluation": common.given(text=eval_text, windows=eval_windows),
        }
    )
    record = search_plan(
        recipe,
        out,
        space=space,
        settings=SearchSettings(
            budget=budget, population=population, offspring=offspring, seed=search_seed
        ),
        first=first,
        workers=Workers(executor or ("serial" if workers == 1 else "processes"), workers, address),
        fresh=fresh,
        progress=common.progress(as_json),
    )
    if as_json:
        common.emit({k: v for k, v in record.items() if k != "history"})
        return
    _show(record, common.plain(out))


def _show(record: dict[str, Any], out: str) -> None:
    best = record["best"]
    tried = len(record["history"])
    unit = "KL" if record["fitness"] == "kl" else "cross-entropy"
    common.say()
    common.say(f"[bold]{common.plain(best['candidate'])}[/bold]")
    common.say(
        f"{unit} {best['value']:.5g} nats a token on the search split; uniform {record['start']:.5g}"
    )
    more = ", no new plan left" if record["exhausted"] else ""
    common.say(f"{tried} plans tried{more}; found as number {best['n'] + 1}")
    if record["space"] == "dsa":
        common.say(f"use it     --allocation dsa -A preset={out}/found.json")
    common.say(f"the plan   --allocation {out}/plan.json")
    common.say(f"drawn      {out}/search.svg")
