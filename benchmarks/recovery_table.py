"""The recovery benchmark's figures as the tables and the picture of docs/recovery.md.

python -m benchmarks.recovery_table            # print them
python -m benchmarks.recovery_table --write    # and put them into the docs
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import RESULTS
from secateur.files import write_text
from secateur.report.charts import Series, line_chart, standalone

DOCS = Path(__file__).parents[1] / "docs"
START, END = "<!-- figures of benchmarks.recovery -->", "<!-- end of figures -->"
Cells = dict[tuple[str, str, str], list[dict[str, Any]]]


def cells(record: dict[str, Any]) -> Cells:
    """(criterion, target, way) to the cells of all seeds."""
    out: Cells = {}
    for name, ways in record["cells"].items():
        criterion, target, _ = name.split()
        for way, cell in ways.items():
            out.setdefault((criterion, target, way), []).append(cell)
    return out


def ppl(found: list[dict[str, Any]]) -> str:
    """Mean over seeds, and how far they lie apart."""
    values = [c["perplexity"] for c in found]
    text = f"{mean(values):.4g}"
    spread = max(values) - min(values)
    return text if len(values) == 1 else f"{text} ± {spread / 2:.2g}"


def table(record: dict[str, Any]) -> str:
    """Ways down, criteria and targets across."""
    found = cells(record)
    columns = list(dict.fromkeys((c, t) for c, t, _ in found))
    ways = list(dict.fromkeys(w for _, _, w in found))
    ways.sort(key=lambda w: mean(x["share"] for k, v in found.items() if k[2] == w for x in v))
    seeds = max(len(v) for v in found.values())
    s = record["settings"]
    lines = [
        f"**{s['model']}**: dense {record['dense']['perplexity']:.4g}; {s['steps']} steps of "
        f"{s['batch'] * s['length']} tokens; perplexity on {s['evaluated_tokens']:,} held-out tokens, "
        + (f"mean of up to {seeds} seeds ± half their range." if seeds > 1 else "one seed."),
        "",
        "| trained | share | rate | CPU s | "
        + " | ".join(f"{c} {_percent(t)}" for c, t in columns)
        + " |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]
    for way in ways:
        own = [x for k, v in found.items() if k[2] == way for x in v]
        rate = record["rates"].get(way, {}).get("lr")
        row = [
            way,
            f"{mean(x['share'] for x in own):.3%}",
            "" if rate is None else f"{rate:g}",
            f"{mean(x['cpu_seconds'] for x in own):.1f}" if way != "none" else "",
        ]
        row += [ppl(found[c, t, way]) if (c, t, way) in found else "" for c, t in columns]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def claims(record: dict[str, Any]) -> list[str]:
    """PERP's central claim, counted over the grid as found."""
    found = cells(record)
    small = "biases+norms" if any(w == "biases+norms" for _, _, w in found) else "norms"
    lines = []
    for way in (small, "mask-lora"):
        for rival in ("wanda", "sparsegpt"):
            pairs = [
                (mean(x["perplexity"] for x in v), mean(x["perplexity"] for x in found[k]))
                for (c, t, w), v in found.items()
                if c == "magnitude" and w == way and (k := (rival, t, "none")) in found
            ]
            if pairs:
                won = sum(a < b for a, b in pairs)
                lines.append(
                    f"- magnitude + {way} is better than {rival} without training at "
                    f"{won} of {len(pairs)} targets"
                )
        shares = []
        for (c, t, w), v in found.items():
            if w != way or (c, t, "full") not in found:
                continue
            cut, mended, full = (
                math.log(mean(x["perplexity"] for x in cell))
                for cell in (found[c, t, "none"], v, found[c, t, "full"])
            )
            shares.append((cut - mended) / (cut - full))
        if shares:
            lines.append(
                f"- {way} brings {min(shares):.0%} to {max(shares):.0%} (mean {mean(shares):.0%}) of "
                "what full retraining brings in the same steps, in nats"
            )
    return lines


def picture(record: dict[str, Any], target: str = "0.6") -> str | None:
    """Perplexity over the share of parameters trained, one line a criterion."""
    found = cells(record)
    series = []
    for tone, criterion in enumerate(("magnitude", "wanda", "sparsegpt")):
        points = sorted(
            (math.log10(v[0]["share"]), mean(x["perplexity"] for x in v))
            for (c, t, w), v in found.items()
            if c == criterion and t == target and w != "none"
        )
        cut = found.get((criterion, target, "none"))
        if points and cut:
            left = points[0][0] - 0.5
            start = (left, mean(x["perplexity"] for x in cut), "not trained")
            series.append(Series(criterion, points, [start], tone))
    if not series:
        return None
    chart = line_chart(
        series,
        title=f"Perplexity over the share of parameters trained, {_percent(target)} pruned",
        x_label="parameters trained (diamonds: none)",
        y_label="perplexity",
        log_y=True,
        reference=(record["dense"]["perplexity"], "dense"),
        x_text=lambda x: f"{10**x:.2%}",
    )
    return standalone(chart)


def _percent(target: str) -> str:
    return target if ":" in target else f"{float(target):.0%}"


def text() -> str:
    """Everything there are results for."""
    out = []
    for name in ("recovery", "recovery_biased", "recovery_smollm"):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        if not any(record["cells"].values()):
            continue
        out += [table(record), "", f"`{record['command']}`", "", *claims(record), ""]
    path = RESULTS / "recovery_speed.json"
    if path.exists():
        record = json.loads(path.read_text())
        out += [
            f"Costs on SmolLM2-135M, {record['tokens_per_step']} tokens a step, each way in a process of "
            "its own (`python -m benchmarks.recovery --speed`):",
            "",
            "| | measured | wanted |",
            "|---|---|---|",
        ]
        for key, value in record.items():
            if isinstance(value, dict) and "limit" in value:
                out.append(f"| {key} | {value['median']:.2f}× | ≤ {value['limit']:g}× |")
        out.append("")
    return "\n".join(out)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/recovery.md")
    write = parser.parse_args().write
    tables = text()
    print(tables)
    if write:
        path = RESULTS / "recovery.json"
        drawn = picture(json.loads(path.read_text())) if path.exists() else None
        if drawn is not None:
            write_text(DOCS / "recovery.svg", drawn)
            tables += "\n![Perplexity over the share of parameters trained](recovery.svg)\n"
        page = (DOCS / "recovery.md").read_text()
        body = f"{START}\n{tables}\n{END}"
        pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.S)
        write_text(DOCS / "recovery.md", pattern.sub(lambda _: body, page))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
