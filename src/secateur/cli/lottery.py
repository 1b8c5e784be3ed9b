"""Strong lottery tickets: find a trained network inside a random one, with a proof.

A ticket is a seed and bits: which weights of a random network survive. No weight is trained.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.lottery.certificate import Certificate
    from secateur.lottery.construction import Construction

app = typer.Typer(
    help=__doc__, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)

Network = Annotated[
    str,
    typer.Argument(
        metavar="NETWORK",
        help="safetensors of a ReLU network, 'digits' (trained here), or 'he:784-300-100-10'",
    ),
]
Domain = Annotated[str, typer.Option(help="box of inputs, LOW,HIGH")]
Method = Annotated[str, typer.Option(help="arithmetic of the proof: interval or zonotope")]
Kind = Annotated[
    str, typer.Option("--construction", "-c", help="log, subset-sum, malach or copies")
]
CONSTRUCTIONS = {
    "log": "secateur.lottery.log_ticket:LogTicket",
    "subset-sum": "secateur.lottery.subset_sum:SubsetSumTicket",
    "malach": "secateur.lottery.malach:MalachTicket",
    "copies": "secateur.lottery.copies:CopyTicket",
}


@app.command()
def find(
    network: Network,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the ticket's file")] = None,
    construction: Kind = "log",
    eps: Annotated[float | None, typer.Option(help="largest output error on the domain")] = None,
    weight_eps: Annotated[float | None, typer.Option(help="or: error of every weight")] = None,
    domain: Domain = "0,1",
    delta: Annotated[float, typer.Option(help="failure probability of the first pools")] = 0.05,
    seed: Annotated[int, typer.Option(help="of the random network, 64 bits")] = 0,
    method: Method = "interval",
    option: common.Options = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="sizes only, find nothing")] = False,
    page: Annotated[Path | None, typer.Option(help="also write an HTML page here")] = None,
    as_json: common.Json = False,
) -> None:
    """Find a ticket, certify it and write its file.

    [bold]Examples[/bold]

      secateur lottery find digits --eps 0.5 --out ticket.safetensors

      secateur lottery find digits -c subset-sum --weight-eps 0.01 -o ticket.safetensors

      secateur lottery find he:784-300-100-10 --weight-eps 0.01 --estimate

      secateur lottery find digits --eps 0.5 -O pools=matching -O base=3/2 -o ticket.safetensors
    """
    from secateur.lottery import certify, save_ticket
    from secateur.lottery.report import write_ticket_page
    from secateur.lottery.targets import resolve_target

    options = common.read_options(option) or {}
    finder = build(construction, options | {"eps": eps, "weight_eps": weight_eps, "delta": delta})
    target = resolve_target(network)
    if estimate:
        sizes = finder.estimate(target, domain).record()
        if as_json:
            common.emit(sizes)
        else:
            for name, value in sizes.items():
                common.say(f"{name:<12} {_number(value)}")
        return
    if out is None:
        raise UsageError("where shall the ticket go?", field="out", fix="--out ticket.safetensors")
    if out.is_dir() or any(parent.is_file() for parent in out.parents):
        raise UsageError("no file can be written there", field="out", value=str(out))
    progress = common.progress(as_json)
    ticket = finder.fit(target, domain, seed=seed, progress=progress)
    with progress.stage("certificate"):
        certificate = certify(ticket, method=_method(method))
    save_ticket(ticket, out, certificate)
    if page is not None:
        write_ticket_page(ticket, certificate, page, common.command_line())
    size = ticket.size()
    record = {
        "ticket": str(out),
        "bytes": out.stat().st_size,
        "construction": ticket.construction,
        "size": dataclasses.asdict(size),
        "certificate": certificate.record(),
        "history": ticket.history,
    }
    if as_json:
        common.emit(record)
        return
    common.say(
        f"[bold]{size.kept:,}[/bold] of {size.random:,} random parameters kept "
        f"({size.kept_per_weight:.2f} for each of {size.target:,} weights)"
    )
    _say_certificate(certificate)
    common.say(f"ticket {out}: seed {seed} and bits; re-check: secateur lottery verify {out}")


@app.command()
def verify(
    ticket: Annotated[Path, typer.Argument(help="a ticket's file")],
    target: Annotated[
        str | None, typer.Option(help="also check that it was made for this network")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Re-check a ticket's file from its seed alone; exit code 1 if any claim fails.

    [bold]Examples[/bold]

      secateur lottery verify ticket.safetensors

      secateur lottery verify ticket.safetensors --target digits
    """
    from secateur.lottery.targets import resolve_target
    from secateur.lottery.verify import verify_ticket

    result = verify_ticket(ticket, resolve_target(target) if target else None)
    if as_json:
        common.emit(result.record())
        raise typer.Exit(0 if result.holds else 1)
    for check in result.checks:
        mark = "[green]ok[/green]    " if check.holds else "[red]failed[/red]"
        common.say(f"{mark} {check.name}: {check.words}")
    result.raise_if_false()


@app.command()
def certify(
    before: Annotated[str, typer.Argument(help="the network before (as NETWORK in find)")],
    after: Annotated[str, typer.Argument(help="the network after, same architecture")],
    domain: Domain = "0,1",
    method: Method = "zonotope",
    as_json: common.Json = False,
) -> None:
    """Prove how far a pruned (or quantised) ReLU network is from the original on a box.

    [bold]Example[/bold]

      secateur lottery certify dense.safetensors pruned.safetensors --domain 0,1
    """
    from secateur.lottery import certify_pruning
    from secateur.lottery.targets import resolve_target

    dense, pruned = resolve_target(before), resolve_target(after)
    certificate = certify_pruning(dense, pruned, domain, method=_method(method))
    if as_json:
        common.emit(certificate.record())
        return
    _say_certificate(certificate)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="growth, success, sizes, popup or all")],
    out: common.Out,
    quick: Annotated[bool, typer.Option("--quick", help="seconds instead of minutes")] = False,
    seed: Annotated[int, typer.Option(help="of everything drawn")] = 0,
    as_json: common.Json = False,
) -> None:
    """Run one of the experiments of docs/lottery.md: tables, charts and JSON.

    [bold]Examples[/bold]

      secateur lottery experiment growth --out growth

      secateur lottery experiment all --quick --out experiments
    """
    from secateur.lottery.experiments import experiments
    from secateur.lottery.report import write_experiment

    names = experiments.names() if name == "all" else [name]
    records: dict[str, Any] = {}
    for each in names:
        result = experiments[each](quick, seed, common.progress(as_json))
        paths = write_experiment(result, out, each, common.command_line())
        records[each] = {"findings": result.findings, "files": [str(p) for p in paths]}
        if not as_json:
            common.say(f"[bold]{result.title}[/bold]")
            for line in result.findings:
                common.say(f"  {line}")
            common.say(f"  page {paths[0]}")
    if as_json:
        common.emit(records)


def build(kind: str, options: dict[str, Any]) -> Construction:
    """The construction of that name with these options; unknown ones are refused by name."""
    from secateur.lottery.construction import Construction
    from secateur.registry import Registry

    chosen = Registry[type[Construction]]("construction", {**CONSTRUCTIONS})[kind]
    known = {field.name for field in dataclasses.fields(chosen)}
    for key, value in options.items():
        if key not in known:
            raise UsageError(
                f"construction '{kind}' has no such option",
                field=key,
                value=value,
                fix=f"options: {', '.join(sorted(known))}",
            )
    return chosen(**options)


def _method(method: str) -> Any:
    if method not in ("interval", "zonotope"):
        raise UsageError("unknown method", field="method", value=method, fix="interval or zonotope")
    return method


def _say_certificate(certificate: Certificate) -> None:
    common.say(
        f"largest output error on the box: at least {certificate.empirical:.4g} (found), "
        f"at most [bold]{certificate.bound:.4g}[/bold] (proved, {certificate.method})"
    )
    common.say(f"largest weight error {max(certificate.weight_error):.4g}")
    if certificate.float32_measured is not None:
        common.say(
            f"masked network run in float32: {certificate.float32_measured:.2g} from its exact "
            f"function over {certificate.samples} inputs"
        )


def _number(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_number(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
