"""GGUF files for llama.cpp from a dense-masked Hugging Face folder of the Llama family.

The zeros stay zeros but are stored like any other value: GGUF has no sparse type, so the file
is as large as a dense one of its type (and compresses well). Two conventions differ from
Hugging Face's: llama.cpp rotates neighbouring pairs of a head's channels where transformers
rotates halves, so the rows of q and k are interleaved for the ``llama`` architecture; and
vectors (norms, biases) are always F32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import MissingExtra, SecateurError, UsageError, VerificationError
from secateur.export.folder import ModelFolder
from secateur.export.gguf_vocabulary import add_vocabulary
from secateur.files import replacing
from secateur.progress import SILENT, Progress

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def export_gguf(
    folder: Path | str,
    out: Path | str,
    dtype: str = "f16",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write ``out`` (a .gguf file) from a Hugging Face folder and compare it tensor by tensor.

    Args:
        folder: a uniform Llama, Mistral, Qwen2 or Qwen3 model; its masks, if any, are checked.
        out: the file; overwritten only when the new one is complete.
        dtype: type of the matrices: ``f32``, ``f16`` or ``bf16``.

    Returns:
        ``file``, ``bytes``, ``tensors``, ``architecture``, ``notes`` and ``verified``.

    Raises:
        UsageError: an architecture, a RoPE scaling or a type that is not supported; ``out`` is
            a folder.
        SecateurError: a tensor GGUF has no place for, a weight too large for float16, or the
            file cannot be written.
        VerificationError: the file read back differs.
    """
    gguf = _package()
    if dtype not in _TYPES:
        raise UsageError(
            "not a type to write", field="dtype", value=dtype, fix=f"one of {', '.join(_TYPES)}"
        )
    source = ModelFolder(folder)
    source.require_stock()
    source.check_masks()
    config = source.config
    arch = _architecture(config)
    names = _tensor_names(gguf, source, arch)
    out = Path(out)
    if out.is_dir():
        raise UsageError("a folder is in the way", field="out", value=str(out), fix="name a file")
    factors = rope_factors(config)
    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            _add_config(gguf, writer, config, source, dtype)
            notes = add_vocabulary(gguf, writer, source.path, int(config["vocab_size"]))
            for name, target in names.items():
                spec = source.tensors.spec(name)
                _announce(gguf, writer, target, spec.shape, dtype)
            if factors is not None:
                _announce(gguf, writer, "rope_freqs.weight", tuple(factors.shape), "f32")
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress.stage("writing GGUF", len(names), "tensors") as advance:
                for name, target in names.items():
                    writer.write_tensor_data(_encode(converted(source, name, arch), target, dtype))
                    advance(1)
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
        finally:
            writer.close()
        _verify(gguf, temporary, source, names, arch, dtype, progress)
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "tensors": len(names),
        "architecture": arch,
        "notes": notes,
        "verified": True,
    }


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k from halves to neighbouring pairs, head by head.

    Row ``2 i + h`` of a head comes from row ``h * width / 2 + i``. Works on biases too.

    >>> interleave(torch.arange(8), heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    width = weight.shape[0] // heads
    halves = weight.reshape(heads, 2, width // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Llama 3's per-frequency divisors of the rotation angles, (head_dim / 2,); None if plain.

    Long wavelengths are slowed by ``factor``, short ones left alone, those between are mixed.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = _head_dim(config)
    frequency = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (mix + (1 - mix) / rope["factor"])).float()


def converted(source: ModelFolder, name: str, arch: str) -> Tensor:
    """The tensor in GGUF's row order."""
    tensor = source.tensors.get(name)
    heads = int(source.config["num_attention_heads"])
    if arch == "llama" and ".q_proj." in name:
        return interleave(tensor, heads)
    if arch == "llama" and ".k_proj." in name:
        return interleave(tensor, int(source.config.get("num_key_value_heads") or heads))
    return tensor


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("gguf", "hf", "writing GGUF") from error
    module: ModuleType = gguf
    return module


def _architecture(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise UsageError(
            "this architecture is not written to GGUF",
            field="model_type",
            value=kind,
            fix=f"supported: {', '.join(_ARCHITECTURES)}; llama.cpp converts many others itself",
        )
    missing = [key for key in _REQUIRED if not isinstance(config.get(key), int)]
    if missing:
        raise UsageError(
            f"config.json lacks {', '.join(missing)} (one value for all layers)", field="config"
        )
    if _rope(config)["rope_type"] not in ("default", "linear", "llama3"):
        raise UsageError(
            "this RoPE scaling is not written to GGUF",
            field="rope_type",
            value=_rope(config)["rope_type"],
            fix="default, linear and llama3 are",
        )
    return _ARCHITECTURES[kind]


def _tensor_names(gguf: ModuleType, source: ModelFolder, arch: str) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every tensor that is written."""
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[arch]
    table = gguf.get_tensor_name_map(kind, int(source.config["num_hidden_layers"]))
    names = {}
    for name in source.tensors.names():
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and source.config.get("tie_word_embeddings"):
            continue
        target = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SecateurError(f"GGUF's {arch} architecture has no place for '{name}'")
        names[name] = target
    return names


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings under transformers 5's names, also from older configs."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.setdefault("rope_theta", float(config.get("rope_theta") or 10000.0))
    return rope


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_config(
    gguf: ModuleType, writer: Any, config: Mapping[str, Any], source: ModelFolder, dtype: str
) -> None:
    heads = int(config["num_attention_heads"])
    rope = _rope(config)
    writer.add_name(source.path.name)
    writer.add_context_length(int(config.get("max_position_embeddings") or 2048))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
    writer.add_file_type(int(gguf.LlamaFileType[kinds[dtype]]))


def _stored_type(shape: tuple[int, ...], dtype: str) -> str:
    return dtype if len(shape) > 1 else "f32"


def _announce(
    gguf: ModuleType, writer: Any, target: str, shape: tuple[int, ...], dtype: str
) -> None:
    dtype = _stored_type(shape, dtype)
    size = math.prod(shape) * _TYPES[dtype].itemsize
    if dtype == "bf16":  # numpy has no bfloat16: its bytes are announced
        shape = (*shape[:-1], 2 * shape[-1])
        raw = gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(target, shape, np.dtype(np.uint8), size, raw_dtype=raw)
    else:
        kind = np.dtype(np.float16 if dtype == "f16" else np.float32)
        writer.add_tensor_info(target, shape, kind, size)


def _encode(tensor: Tensor, target: str, dtype: str) -> np.ndarray[Any, Any]:
    kind = _TYPES[_stored_type(tuple(tensor.shape), dtype)]
    cast = tensor.to(kind)
    if not torch.isfinite(cast).all():
        raise SecateurError(
            f"'{target}' does not fit into {kind}",
            field="dtype",
            value=dtype,
            fix="use bf16 or f32",
        )
    array: np.ndarray[Any, Any]
    array = cast.view(torch.uint8).numpy() if kind is torch.bfloat16 else cast.numpy()
    return np.ascontiguousarray(array)


def _verify(
    gguf: ModuleType,
    path: Path,
    source: ModelFolder,
    names: dict[str, str],
    arch: str,
    dtype: str,
    progress: Progress,
) -> None:
    """Read the file back with gguf's own reader and compare every tensor."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with progress.stage("verifying", len(names), "tensors") as advance:
        for name, target in names.items():
            expected = _encode(converted(source, name, arch), target, dtype)
            tensor = found.get(target)
            if tensor is None or tensor.data.tobytes() != expected.tobytes():
                raise VerificationError(f"'{target}' came back different from the GGUF file")
            advance(1)
