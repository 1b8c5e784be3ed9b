"""Vision networks in other forms: ONNX, checked with onnxruntime, and a plain state dict."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.export.onnx import TOLERANCE, packages
from secateur.files import told_plainly
from secateur.models.vision.loading import VisionModel
from secateur.tensorfile import opened, save_tensors


@torch.no_grad()
def export_image_onnx(loaded: VisionModel, out: Path) -> dict[str, Any]:
    """Write ``out``, a graph from pixels (B, C, H, W) to logits with any B; masked weights are zeros.

    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is missing. SecateurError: torch cannot
            export this network. VerificationError: onnxruntime computes something else.
    """
    runtime = packages()
    if out.is_dir():
        raise UsageError("a folder is in the way", field="out", value=str(out), fix="name a file")
    assert loaded.input is not None
    model = loaded.model.eval().float().cpu()
    pixels = torch.randn(2, *loaded.input, generator=torch.Generator().manual_seed(0))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model,
                (pixels,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("images", min=1)},),
                input_names=["pixels"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:  # torch.export fails in as many ways as there are models
        reason = (str(error).strip().splitlines() or [""])[0]
        raise SecateurError(
            f"torch cannot export '{loaded.name}' ({type(error).__name__}: {reason})",
            fix="pip install -U torch onnx onnxscript",
        ) from error
    with told_plainly(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            file = Path(temporary) / out.name
            program.save(str(file))
            session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            far = 0.0
            for batch in (pixels, pixels[:1], torch.cat([pixels, pixels[:1] + 1])):
                (found,) = session.run(None, {"pixels": batch.numpy()})
                wanted = model(batch)
                difference = float((torch.from_numpy(found) - wanted).abs().max())
                far = max(far, difference / (float(wanted.abs().max()) or 1.0))
            if not far <= TOLERANCE:
                raise VerificationError(f"onnxruntime's logits differ by {far:.2g} of the largest")
            size = sum(part.stat().st_size for part in Path(temporary).iterdir())
            for part in sorted(Path(temporary).iterdir(), key=lambda p: p.name == out.name):
                shutil.move(part, out.parent / part.name)
    proof = f"onnxruntime gives the same logits (to {far:.2g} of the largest)"
    return {"file": str(out), "bytes": size, "relative": far, "proof": proof, "verified": True}


def export_state(loaded: VisionModel, out: Path) -> dict[str, Any]:
    """Write ``out`` (.safetensors) with the tensors by their names, masked weights as zeros."""
    if out.suffix != ".safetensors":
        raise UsageError(
            "a state dict is written as safetensors",
            field="out",
            value=str(out),
            fix=f"--out {Path(out).with_suffix('.safetensors')}",
        )
    state = {n: t.detach().cpu().contiguous().clone() for n, t in loaded.model.state_dict().items()}
    save_tensors(out, state)
    with opened(out) as file:
        same = all(torch.equal(file.get_tensor(name), tensor) for name, tensor in state.items())
    if not same:
        raise VerificationError(f"what was written to '{out}' reads differently")
    proof = f"{len(state)} tensors, read back and equal"
    return {"file": str(out), "bytes": out.stat().st_size, "proof": proof, "verified": True}
