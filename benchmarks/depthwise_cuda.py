"""Depth-wise layers and a whole network on a CUDA device: tap lists beside torch's own layer.

    python -m benchmarks.depthwise_cuda

Every layer of ``benchmarks.depthwise`` at a batch of 32, in float32 and float16: torch on planes
and channels last (cuDNN may search), our direct and gather kernels at several shares of taps
gone, each at its best size of tile. Medians of device time, the cache cleared between calls.
Then the paper's staircase: the gather kernel's time over the columns that are left. Then
EfficientNet-Lite0 (random weights: speed only), dense and pruned, batch norms folded in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import arguments, finish
from benchmarks.deprune import cut
from benchmarks.depthwise import LAYERS
from secateur.kernels import depthwise_triton as forms
from secateur.kernels.depthwise import Taps
from secateur.masks.depthwise import balanced, columns
from secateur.models.inference import inference_copy
from secateur.models.vision.efficientnet_lite import EfficientNetLite0

SHARES = (0.0, 0.5, 0.8, 0.9)
BATCH = 32


def microseconds(work: Callable[[], object]) -> float:
    """Median device time of a call."""
    from triton.testing import do_bench

    found: float = do_bench(work, warmup=5, rep=30, return_mode="median")
    return 1e3 * found


def graphed(model: nn.Module, x: Tensor) -> float:
    """Median device time of a forward without the gaps between its launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return microseconds(graph.replay)


def best(form: str, x: Tensor, taps: Taps) -> float:
    """A kernel at its best size of tile."""
    kernel = {"direct": forms.direct, "gather": forms.gather}[form]
    return min(microseconds(lambda b=b: kernel(x, taps, b)) for b in forms.BLOCKS[form])  # type: ignore[index, misc]


def layer(channels: int, size: int, kernel: int, stride: int, dtype: torch.dtype) -> dict[str, Any]:
    """Microseconds of each way, and ratios over the better of torch's."""
    conv = nn.Conv2d(
        channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
    ).eval()
    x = torch.randn(BATCH, channels, size, size, device="cuda", dtype=dtype)
    x_last = x.contiguous(memory_format=torch.channels_last)
    placed = copy.deepcopy(conv).to("cuda", dtype)
    last = copy.deepcopy(placed).to(memory_format=torch.channels_last)
    micro = {
        "torch planes": microseconds(lambda: placed(x)),
        "torch channels last": microseconds(lambda: last(x_last)),
    }
    gap = 0.0
    for share in SHARES:
        taps = Taps.of(conv, balanced(conv.weight, columns(kernel * kernel, share)))
        weight = taps.dense().to(x)
        wanted = nn.functional.conv2d(x, weight, None, stride, kernel // 2, 1, channels).float()
        for form in ("direct", "gather"):
            micro[f"{form} {share:g}"] = best(form, x, taps)
            for block in forms.BLOCKS[form]:  # type: ignore[index]
                seen = getattr(forms, form)(x, taps, block).float()
                gap = max(gap, float((seen - wanted).norm() / wanted.norm()))
    native = min(micro["torch planes"], micro["torch channels last"])
    ours = {s: min(micro[f"direct {s:g}"], micro[f"gather {s:g}"]) for s in SHARES}
    return {
        "layer": f"{channels}x{size}^2 k{kernel} s{stride}",
        "dtype": str(dtype).removeprefix("torch."),
        "microseconds": {name: round(value, 1) for name, value in micro.items()},
        "over_native": {f"{s:g}": round(native / t, 2) for s, t in ours.items()},
        "over_own_dense": {
            form: {f"{s:g}": round(micro[f"{form} 0"] / micro[f"{form} {s:g}"], 2) for s in SHARES}
            for form in ("direct", "gather")
        },
        "relative_difference": gap,
    }


def staircase(dtype: torch.dtype) -> dict[str, Any]:
    """Time of the gather kernel over the columns each range of 32 channels keeps; 480 x 14², 5 x 5."""
    conv = nn.Conv2d(480, 480, 5, 1, 2, groups=480, bias=False).eval()
    x = torch.randn(BATCH, 480, 14, 14, device="cuda", dtype=dtype)

    def time_of(mask: Tensor) -> float:
        taps = Taps.of(conv, mask)
        return round(microseconds(lambda: forms.gather(x, taps, 64)), 2)

    weight = conv.weight.detach().abs()
    least = weight.flatten().kthvalue(round(0.8 * weight.numel())).values
    return {
        "microseconds": {n: time_of(balanced(conv.weight, n)) for n in range(32, 481, 8)},
        "balanced_at_80": time_of(balanced(conv.weight, columns(25, 0.8))),
        "one_threshold_at_80": time_of(weight <= least),
    }


def network(dtype: torch.dtype) -> dict[str, Any]:
    """EfficientNet-Lite0 at 224 x 224, a graph of the whole forward replayed."""
    torch.manual_seed(0)
    dense = EfficientNetLite0().eval()
    x = torch.randn(BATCH, 3, 224, 224, device="cuda", dtype=dtype)
    example = torch.randn(1, 3, 224, 224)

    def ways(model: nn.Module, masks: dict[str, Tensor], name: str) -> dict[str, float]:
        plain = inference_copy(copy.deepcopy(model).to("cuda", dtype), {}, x)
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        x_last = x.contiguous(memory_format=torch.channels_last)
        found = {
            f"{name}, torch planes": graphed(plain, x),
            f"{name}, torch channels last": graphed(last, x_last),
        }
        if masks:
            placed = {k: m.to("cuda") for k, m in masks.items()}
            fast = inference_copy(copy.deepcopy(model).to("cuda", dtype), placed, x)
            found[f"{name}, ours"] = graphed(fast, x)
        return found

    micro = ways(dense, {}, "dense")
    native = min(micro.values())
    ratios = {}
    for share, pw in ((0.8, 0.0), (0.8, 0.5)):
        model = copy.deepcopy(dense)
        outcome = cut(model, example, "b", share, pw)
        name = f"taps {share:g}, filters {pw:g}"
        micro |= ways(model, outcome.masks, name)
        for way in ("torch planes", "torch channels last", "ours"):
            ratios[f"{name}, {way}"] = round(native / micro[f"{name}, {way}"], 2)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "microseconds": {k: round(v, 1) for k, v in micro.items()},
        "over_dense_native": ratios,
    }


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    args = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    figures: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "batch": BATCH, "layers": [], "staircase": {},
        "networks": [],
    }  # fmt: skip
    for dtype in (torch.float16, torch.float32):
        for shape in LAYERS:
            row = layer(*shape, dtype)
            figures["layers"].append(row)
            print(
                row["layer"],
                row["dtype"],
                row["over_native"],
                row["relative_difference"],
                flush=True,
            )
        figures["staircase"][str(dtype).removeprefix("torch.")] = staircase(dtype)
        finish("depthwise_cuda", figures, args.json)
    for dtype in (torch.float16, torch.float32):
        figures["networks"].append(network(dtype))
        print(figures["networks"][-1]["over_dense_native"], flush=True)
        finish("depthwise_cuda", figures, args.json)


if __name__ == "__main__":
    main()
