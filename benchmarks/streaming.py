"""Does a streamed run's memory grow with depth, and does it keep to a limit?

    python -m benchmarks.streaming

Random Llamas of one width, 16 and 64 blocks, pruned from disk to disk by ``secateur.prune(...,
stream=True)`` in fresh processes: the most each ever held (libraries included). Then a model
whose weights alone exceed the limit put on a process's data (RLIMIT_DATA): streamed it must be
pruned, and as a control loading it whole must fail.
"""

from __future__ import annotations

import json
import re
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import MIB, arguments, finish, in_fresh_process, memory, verdict

WIDTH, SHALLOW, DEEP = 512, 16, 64
LIMIT = 1.1
SAMPLES, LENGTH = 4, 128


def child(folder: str, out: str, method: str, stream: bool, headroom: int | None) -> dict[str, int]:
    """One run in this process; with ``headroom`` it may get so many bytes more and no others."""
    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama

    import secateur
    import secateur.api

    assert transformers.models.llama.modeling_llama
    start = memory("VmHWM")
    if headroom is not None:
        limit = memory("VmData") + headroom
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    ids = torch.randint(4, 256, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    secateur.prune(folder, method=method, calibration=ids, stream=stream, out=out)
    return {"peak": memory("VmHWM"), "imported": start}


def run(folder: Path, method: str, *, stream: bool = True, headroom: int = 0) -> dict[str, int]:
    """``child`` in a fresh process, its output thrown away."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        return in_fresh_process(
            "benchmarks.streaming", "--child", folder, "--out", out, "--method", method,
            "--headroom", headroom, *([] if stream else ["--whole"]),
        )  # fmt: skip


def weight_bytes(folder: Path) -> int:
    """Bytes of the checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def depth(models: dict[int, Path]) -> list[dict[str, Any]]:
    """Peaks of the deep model against the shallow one."""
    cases = []
    for method in ("wanda", "sparsegpt"):
        peaks = {blocks: run(folder, method) for blocks, folder in models.items()}
        growth = peaks[DEEP]["peak"] / peaks[SHALLOW]["peak"]
        cases.append(
            {
                "method": method,
                "peak_bytes": {str(n): p["peak"] for n, p in peaks.items()},
                "peak_bytes_beyond_imports": {
                    str(n): p["peak"] - p["imported"] for n, p in peaks.items()
                },
                "growth": round(growth, 4),
                "limit": LIMIT,
            }
        )
        sizes = ", ".join(f"{n} blocks {p['peak'] / MIB:.0f} MiB" for n, p in peaks.items())
        print(f"{method:10} {sizes}: {growth:.3f}x  {verdict(growth, LIMIT)}", flush=True)
    return cases


def under_limit(folder: Path) -> dict[str, Any]:
    """A run allowed less memory than the weights take."""
    weights = weight_bytes(folder)
    headroom = weights // 3
    streamed = run(folder, "sparsegpt", headroom=headroom)
    try:
        run(folder, "sparsegpt", stream=False, headroom=headroom)
        control = "loading it whole did NOT fail: the limit proves nothing"
    except RuntimeError as error:
        if not re.search("MemoryError|allocate memory", str(error)):
            raise
        control = "refused: no memory"
    print(
        f"weights {weights / MIB:.0f} MiB, allowed beyond imports {headroom / MIB:.0f} MiB: "
        f"pruned streamed; loaded whole: {control}"
    )
    return {
        "weights_bytes": weights,
        "allowed_beyond_imports": headroom,
        "streamed_peak": streamed["peak"],
        "loaded_whole": control,
    }


def main() -> None:
    """Depth, then the limit."""
    parser = arguments(__doc__)
    parser.add_argument("--child", type=str)
    parser.add_argument("--out", type=str)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--headroom", type=int, default=0)
    parser.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    if given.child:
        got = child(given.child, given.out, given.method, not given.whole, given.headroom or None)
        print(json.dumps(got))
        return
    from secateur.models.tiny import synthetic_llama

    with tempfile.TemporaryDirectory() as folder:
        models = {n: synthetic_llama(Path(folder) / str(n), n, WIDTH) for n in (SHALLOW, DEEP)}
        figures = {
            "width": WIDTH,
            "tokens": SAMPLES * LENGTH,
            "weights_bytes": {str(n): weight_bytes(f) for n, f in models.items()},
            "depth": depth(models),
            "limit": under_limit(models[DEEP]),
        }
    finish("streaming", figures, given.json)


if __name__ == "__main__":
    main()
