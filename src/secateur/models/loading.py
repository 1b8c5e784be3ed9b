"""One way in: a name becomes a model, its tokenizer, and the facts a report needs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import MissingExtra, SecateurError, UsageError
from secateur.models.anatomy import text_config
from secateur.models.checks import check_tokenizer, check_weights, fingerprint
from secateur.models.shards import SafetensorsFolder
from secateur.models.sources import Source, resolve
from secateur.models.state import evaluating, quiet
from secateur.models.vision.names import MANIFEST, ZOO
from secateur.progress import SILENT, Progress

if TYPE_CHECKING:
    from secateur.models.streaming import StreamedModel

__all__ = ["DTYPES", "Loaded", "evaluating", "load"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OLDEST = (4, 57)
_OTHER_KINDS = (
    "'secateur heads' prunes the attention heads of any transformer; an encoder can also be loaded "
    "by you and passed to secateur.prune"
)


@dataclass
class Loaded:
    """A model ready for work.

    Attributes:
        model: on its device, in evaluation mode (parameters on meta when streamed).
        tokenizer: None if it was not asked for.
        folder: where its files lie.
        name: for people and reports.
        fingerprint: SHA-256 over config and weights.
        notes: what a report should mention about the origin.
        streamed: keeper of the blocks' weights when loaded with ``stream=True``.
    """

    model: Any
    tokenizer: Any
    folder: Path | None
    name: str
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    streamed: StreamedModel | None = None
    stored: torch.dtype | None = None
    """What to write weights as when that is narrower than what is computed in (a bfloat16
    checkpoint is worked on in float32 on a CPU, and stays a bfloat16 checkpoint)."""

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids lie below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def window(self, length: int | None, field: str = "length", usual: int = 512) -> int:
        """Tokens in a window: ``length`` if the model has the positions, ``usual`` if not said.

        Raises:
            UsageError: more tokens than positions.
        """
        config = text_config(self.model)
        positions = getattr(config, "max_position_embeddings", None) or usual
        if length is None:
            return min(usual, positions)
        if length > positions:
            raise UsageError(
                f"the model has {positions} positions",
                field=field,
                value=length,
                fix=f"at most {positions}",
            )
        return length

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        if self.streamed is not None:
            return self.streamed.device
        device: torch.device = next(self.model.parameters()).device
        return device


def load(
    spec: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    tokenizer: bool = True,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    progress: Progress = SILENT,
) -> Loaded:
    """Load a causal language model.

    Args:
        spec: hub id, local folder, GGUF file, ``demo`` or ``tiny``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: float32 on a CPU (half
            precision is many times slower there), the checkpoint's own on a GPU.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``.
        stream: leave the blocks on disk and bring them in one at a time.
        tokenizer: load it too, and check that it fits.
        trust_remote_code: run Python code shipped with the model.
        blocks: path of the list of blocks, needed only to stream an unknown architecture.

    Raises:
        UsageError: no such model; not a causal language model; quantised; no tokenizer or
            the wrong one; a value out of range.
        SecateurError: damaged files. NumericsError: NaN or infinity in the weights.
    """
    _require_transformers()
    where = device_of(device)
    if spec in ZOO and not Path(spec).exists():
        raise _is_vision(spec)
    source = resolve(spec, code=trust_remote_code, progress=progress)
    tensors = _tensors(source)
    config = _config(source, trust_remote_code)
    kind = _dtype(dtype, where, config, tensors)
    notes = list(source.notes)
    streamed = None
    with quiet(), progress.stage(f"loading {source.name}"):
        words = _tokenizer(source, trust_remote_code) if tokenizer else None
        if stream:
            from secateur.models.streaming import StreamedModel
            from secateur.models.structured_saving import read_manifest

            manifest = read_manifest(source.folder)
            if manifest is not None and not manifest["stock"]:
                raise UsageError(
                    "its layers have shapes of their own, and streaming builds stock ones",
                    field="stream",
                    value=True,
                    fix="load it whole, or prune with structure: {uniform: true}",
                )

            streamed = StreamedModel.open(
                source.folder, config, kind, where, trust_remote_code, blocks
            )
            model = streamed.model
        else:
            model = _model(source, config, kind, trust_remote_code, notes)
            check_weights(model)
            model = model.to(where)
    model.eval()
    if words is not None:
        check_tokenizer(words, model.get_input_embeddings().weight.shape[0])
    mark = fingerprint(source.folder)
    stored = _narrower(tensors, kind) if dtype == "auto" else None
    return Loaded(model, words, source.folder, source.name, mark, notes, streamed, stored)


def _narrower(tensors: SafetensorsFolder, computed: torch.dtype) -> torch.dtype | None:
    """The checkpoint's one floating type if it is a 16-bit one and wider is computed in."""
    kinds = {tensors.dtype(name) for name in tensors.names()} - {torch.int64, torch.bool}
    if computed != torch.float32 or len(kinds) != 1 or not kinds <= set(DTYPES.values()):
        return None
    kind = kinds.pop()
    return None if kind == computed else kind


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", "hf", "loading a language model")
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise UsageError(
            "too old",
            field="transformers",
            value=transformers.__version__,
            fix="pip install -U 'transformers>=4.57,<6'",
        )


def device_of(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            "not a device", field="device", value=name, fix="auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"this machine has {torch.cuda.device_count()} CUDA devices",
            field="device",
            value=name,
            fix="--device cpu",
        )
    return device


def _dtype(name: str, device: torch.device, config: Any, tensors: SafetensorsFolder) -> torch.dtype:
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UsageError(
            "unknown type", field="dtype", value=name, fix=f"auto, {', '.join(DTYPES)}"
        )
    if device.type == "cpu":
        return torch.float32
    declared = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    kinds = {tensors.dtype(name) for name in tensors.names()}
    return next((t for t in (torch.bfloat16, torch.float16) if t in kinds), torch.float32)


def _tensors(source: Source) -> SafetensorsFolder:
    if (source.folder / "adapter_config.json").is_file():
        raise UsageError(
            "holds an adapter (LoRA), whose weights are only a difference to a model's",
            field="model",
            value=str(source.folder),
            fix="merge it into its model: PeftModel.from_pretrained(model, folder)"
            ".merge_and_unload().save_pretrained(new_folder)",
        )
    if (source.folder / MANIFEST).is_file():
        raise _is_vision(str(source.folder))
    if not (source.folder / "config.json").is_file():
        raise UsageError(
            "holds no config.json, so it is not a model folder",
            field="model",
            value=str(source.folder),
            fix="give the folder written by save_pretrained",
        )
    return SafetensorsFolder(source.folder)


def _is_vision(value: str) -> UsageError:
    return UsageError(
        "is a vision network, and this works on language models",
        field="model",
        value=value,
        fix="prune, eval and compare take it with --images SPEC; verify, report, why and export "
        "take its folder",
    )


def _config(source: Source, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # malformed JSON, unknown type, remote code refused: many kinds
        raise UsageError(
            f"its config.json is not understood ({_first_line(error)})",
            field="model",
            value=str(source.folder),
            fix="pip install -U transformers, or --trust-remote-code if the model ships its code",
        ) from error
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else quantised
        raise UsageError(
            f"is quantised ({method}); packed weights cannot be pruned",
            field="model",
            value=source.name,
            fix="give the unquantised model, or de-quantise it first: "
            "model.dequantize().save_pretrained(folder)",
        )
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise UsageError(
            f"'{config.model_type}' is not a causal language model",
            field="model",
            value=source.name,
            fix=_OTHER_KINDS,
        )
    return config


def is_causal(architecture: str) -> bool:
    """Whether transformers' auto class for causal language models gives this class.

    >>> is_causal("LlamaForCausalLM"), is_causal("BertModel")
    (True, False)
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _model(
    source: Source, config: Any, dtype: torch.dtype, trust_remote_code: bool, notes: list[str]
) -> Any:
    from transformers import AutoModelForCausalLM

    from secateur.models.structured_saving import (
        load_structured,
        read_manifest,
        restore_structure,
    )

    manifest = read_manifest(source.folder)
    if manifest is not None:
        notes.append("was pruned before: units keep the numbers they had in the original model")
    if manifest is not None and not manifest["stock"]:
        return load_structured(
            source.folder, manifest, dtype=dtype, trust_remote_code=trust_remote_code
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        raise SecateurError(
            f"'{source.folder}' could not be loaded ({type(error).__name__}: {_first_line(error)})",
            fix="check that config.json and the weights belong together",
        ) from error
    model, info = loaded
    absent = sorted(info.get("missing_keys") or [])
    named = (getattr(config, "architectures", None) or [""])[0]
    if absent and named and not is_causal(named):
        raise UsageError(
            f"'{named}' is not a causal language model",
            field="model",
            value=source.name,
            fix=_OTHER_KINDS,
        )
    if absent:
        raise SecateurError(
            f"'{source.folder}' lacks {len(absent)} of the model's tensors, first '{absent[0]}'",
            fix="check that config.json and the weights belong together",
        )
    unused = sorted(info.get("unexpected_keys") or [])
    if unused:
        notes.append(f"{len(unused)} tensors of the checkpoint are not used, first '{unused[0]}'")
    if manifest is not None:
        restore_structure(model, manifest, source.folder)
    return model


def _tokenizer(source: Source, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    reason, cause = "holds no tokenizer files", None
    if any((source.folder / name).is_file() for name in names):
        try:
            return AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            reason = f"its tokenizer cannot be read ({_first_line(error)})"
            cause = error
    raise UsageError(
        reason,
        field="model",
        value=str(source.folder),
        fix="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder",
    ) from cause


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
