"""The two explaining pictures of docs/lottery.md, drawn from a real ticket for one weight.

python benchmarks/lottery/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from secateur.files import write_text
from secateur.lottery import LogTicket, Ticket
from secateur.lottery.decomposition import BASES

OUT = Path(__file__).parents[2] / "docs" / "lottery"
WEIGHT, SEED = 0.7231, 2
STYLE = """
text{font:14px system-ui,sans-serif;fill:#333}.soft{fill:#777;font-size:12px}
.mono{font-family:ui-monospace,monospace}.pale{stroke:#bbb;stroke-width:1}
.kept{stroke:#228062;stroke-width:2.5}.node{fill:#fff;stroke:#555;stroke-width:1.5}
.dead{fill:none;stroke:#bbb}.live{fill:#228062;stroke:#228062}.band{fill:#228062;opacity:.13}
.take{fill:#228062}.skip{fill:none;stroke:#c65826;stroke-width:1.5}.axis{stroke:#777;stroke-width:1}
@media(prefers-color-scheme:dark){text{fill:#ddd}.soft{fill:#999}.node{fill:#222;stroke:#aaa}
.pale,.dead{stroke:#555}}
"""


def svg(width: int, height: int, title: str, description: str, parts: list[str]) -> str:
    """A self-contained SVG."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'role="img"><title>{title}</title><desc>{description}</desc><style>{STYLE}</style>'
        + "".join(parts)
        + "</svg>\n"
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def one_weight() -> Ticket:
    """A ticket for ``y = 0.7231 x`` on [0, 1], plain greedy."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(WEIGHT)
    return LogTicket(weight_eps=0.02, refine=1).fit(nn.Sequential(linear), (0, 1), seed=SEED)


def construction(ticket: Ticket) -> str:
    """The random pool of one input and the few neurons that survive."""
    kept, layer = ticket.layers[0], ticket.target.layers[0]
    a, b = (w.tolist() for w in (kept.in_weights(SEED, 0, layer), kept.out_weights(SEED, 0, layer)))
    shown, columns, left, top = 84, 28, 150, 46
    total = int(kept.sizes[0])
    marks = {int(n) * shown // total for n in kept.neuron}
    parts, lines = [], []
    for i in range(shown):
        x, y = left + 18 * (i % columns), top + 44 * (i // columns)
        live = i in marks
        parts.append(f'<circle cx="{x}" cy="{y}" r="6" class="{"live" if live else "dead"}"/>')
        if live:
            lines.append(f'<path d="M42 90L{x} {y}M{x} {y}L738 90" class="kept" opacity=".55"/>')
    ends = [
        '<circle cx="34" cy="90" r="14" class="node"/>', text(34, 95, "x"),
        '<circle cx="746" cy="90" r="14" class="node"/>', text(746, 95, "y"),
    ]  # fmt: skip
    sums = " + ".join(f"({p:.3f})({q:.3f})" for p, q in zip(a, b, strict=True))
    got = float(ticket.fold().layers[0].positive)
    words = [
        text(390, 22, f"{total} random neurons stand between x and y; {len(a)} survive", "soft"),
        text(390, 192, f"a·b summed over the survivors: {sums}", "mono soft"),
        text(390, 216, f"= {got:.4f}, wanted {WEIGHT} within 0.02; nothing was trained"),
    ]
    return svg(
        780, 232, "A weight out of random neurons",
        "A few of many random neurons between one input and one output are kept.",
        lines + parts + ends + words,
    )  # fmt: skip


def decomposition(ticket: Ticket) -> str:
    """The greedy rule, step by step: interval, part found, remainder."""
    gamma, kept, layer = BASES["golden"], ticket.layers[0], ticket.target.layers[0]
    a, b = kept.in_weights(SEED, 0, layer).double(), kept.out_weights(SEED, 0, layer).double()
    products = torch.sort(a * b, descending=True).values.tolist()
    bits = round(kept.law.span / -torch.tensor(gamma).double().log().item())
    scale = kept.law.scale**2
    left, wide, rest, parts = 150, 560, WEIGHT, []
    for i in range(bits):
        y = 40 + 30 * i
        high, low = scale * gamma**i, scale * gamma ** (i + 1)
        x1, x2 = left + wide * low, left + wide * high
        parts.append(f'<rect x="{x1:.1f}" y="{y}" width="{x2 - x1:.1f}" height="16" class="band"/>')
        parts.append(text(left - 12, y + 13, f"1/φ^{i + 1} … 1/φ^{i}", "soft", "end"))
        parts.append(
            f'<line x1="{left + wide * rest:.1f}" y1="{y - 4}" x2="{left + wide * rest:.1f}" '
            f'y2="{y + 20}" class="axis" stroke-dasharray="3 2"/>'
        )
        inside = [p for p in products if low <= p <= high]
        if inside:
            x = left + wide * inside[0]
            parts.append(f'<circle cx="{x:.1f}" cy="{y + 8}" r="6" class="take"/>')
            rest -= inside[0]
            parts.append(
                text(730, y + 13, f"take {inside[0]:.4f}, left {rest:.4f}", "soft", "start")
            )
        else:
            parts.append(text(730, y + 13, f"too large, left {rest:.4f}", "soft", "start"))
    parts.append(text(390, 20, f"w = {WEIGHT}: dashed, what is left before each step", "soft"))
    return svg(
        920, 60 + 30 * bits, "Golden-ratio decomposition",
        "One random product from every interval; each is taken if it still fits.", parts,
    )  # fmt: skip


def main() -> None:
    ticket = one_weight()
    write_text(OUT / "construction.svg", construction(ticket))
    write_text(OUT / "decomposition.svg", decomposition(ticket))


if __name__ == "__main__":
    main()
