"""ONNX of a dense or pruned transformer, checked with onnxruntime.

The graph maps token ids to logits (an encoder without a head: to its last hidden states);
batch and length are free, there is no key-value cache. Encoders take an attention mask too,
encoder-decoders also the ids the decoder is fed. Attention is written out (``eager``), which
every runtime understands.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import MissingExtra, SecateurError, UsageError, VerificationError
from secateur.export.loading import load_pruned
from secateur.files import told_plainly
from secateur.models.loading import is_causal
from secateur.models.state import quiet
from secateur.progress import SILENT, Progress

TOLERANCE = 1e-3
"""Difference of logits, relative to the largest, that another runtime's order of sums explains."""
_SHAPES = ((2, 12), (1, 7), (3, 20))


class _Graph(nn.Module):
    """Token ids (B, L), and what else the kind of model takes -> one tensor, and nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.extra: dict[str, Any] = {}
        if "use_cache" in inspect.signature(model.forward).parameters:
            self.extra["use_cache"] = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        given = dict(self.extra)
        if attention_mask is not None:
            given["attention_mask"] = attention_mask
        if decoder_input_ids is not None:
            given["decoder_input_ids"] = decoder_input_ids
        output = self.model(input_ids=input_ids, **given)
        found: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return found


def _inputs(model: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Inputs of the graph by name, for ``shape`` (B, L): drawn ids, the last token as padding."""
    ids = _ids(model, shape)
    paired = bool(getattr(model.config, "is_encoder_decoder", False))
    if not paired and is_causal(type(model).__name__):
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    if not paired:
        return {"input_ids": ids, "attention_mask": mask}
    fed = _ids(model, (shape[0], shape[1] // 2 + 1))
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": fed}


def export_onnx(folder: Path | str, out: Path | str, progress: Progress = SILENT) -> dict[str, Any]:
    """Write ``out`` (a .onnx file) from a model folder and compare its logits with torch's.

    Args:
        folder: dense or pruned, stock or with a manifest; computed in float32.
        out: the file. Weights beyond 2 GB go beside it as ``<out>.data``.

    Returns:
        ``file``, ``bytes``, ``max_difference``, ``relative``, ``shapes`` compared, ``verified``.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
        UsageError: ``out`` is a folder. SecateurError: torch cannot export this model.
        VerificationError: onnxruntime computes other logits.
    """
    runtime = packages()
    out = Path(out)
    if out.is_dir():
        raise UsageError("a folder is in the way", field="out", value=str(out), fix="name a file")
    with quiet(), progress.stage("loading"):
        model = load_pruned(folder, dtype=torch.float32, attn_implementation="eager").eval()
    graph = _Graph(model).eval()
    with progress.stage("exporting"):
        program = _export(graph, _inputs(model, _SHAPES[0]), str(folder))
    with told_plainly(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            file = Path(temporary) / out.name
            program.save(str(file))
            with progress.stage("comparing", len(_SHAPES), "inputs") as advance:
                record = _compare(runtime, file, graph, advance)
            size = 0
            for part in sorted(Path(temporary).iterdir()):  # the graph last: it names the rest
                size += part.stat().st_size
            for part in sorted(Path(temporary).iterdir(), key=lambda p: p.name == out.name):
                shutil.move(part, out.parent / part.name)
    return {"file": str(out), "bytes": size, **record, "verified": True}


def packages() -> Any:
    """onnxruntime, once all that writing and checking ONNX needs is there."""
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ImportError as error:
            raise MissingExtra(name, "onnx", "writing ONNX") from error
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx", "checking ONNX") from error
    return onnxruntime


def _ids(model: Any, shape: tuple[int, int]) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    return torch.randint(4, vocabulary, shape, generator=generator)


def _output(model: Any) -> str:
    """The output's name: a model without a head gives hidden states."""
    return "last_hidden_state" if type(model).__name__.endswith("Model") else "logits"


def _export(graph: _Graph, inputs: dict[str, Tensor], name: str) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    given = inspect.signature(graph.forward).parameters
    free = {0: dynamic, 1: dynamic}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                graph,
                tuple(inputs.get(name) for name in given),
                dynamo=True,
                dynamic_shapes=tuple(free if name in inputs else None for name in given),
                input_names=list(inputs),
                output_names=[_output(graph.model)],
                verbose=False,
            )
    except Exception as error:  # torch.export fails in as many ways as there are models
        reason = (str(error).strip().splitlines() or [""])[0]
        raise SecateurError(
            f"torch cannot export '{name}' ({type(error).__name__}: {reason})",
            fix="pip install -U torch onnx onnxscript",
        ) from error


@torch.no_grad()
def _compare(runtime: Any, file: Path, graph: _Graph, advance: Any) -> dict[str, Any]:
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = largest = 0.0
    for shape in _SHAPES:
        inputs = _inputs(graph.model, shape)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        expected = graph(**inputs)
        difference = (torch.from_numpy(found) - expected).abs().max()
        worst, largest = max(worst, float(difference)), max(largest, float(expected.abs().max()))
        advance(1)
    relative = worst / largest if largest else worst
    if not relative <= TOLERANCE:
        raise VerificationError(
            f"onnxruntime's logits differ by up to {worst:.3g} ({relative:.2g} of the largest)"
        )
    return {"max_difference": worst, "relative": relative, "shapes": [list(s) for s in _SHAPES]}
