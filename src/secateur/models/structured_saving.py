"""Saving what is left of a model, and building it again.

Where every layer kept the same widths, a config can say it all and the folder is a stock
checkpoint. Otherwise ``config.json`` is the original model's and ``pruning_manifest.json``
says which units are gone; ``load_structured`` builds the original without memory, cuts the
same units out and puts the weights in. No code travels with the model.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.errors import SecateurError, UsageError, VerificationError
from secateur.files import write_json
from secateur.masks.structured import StructuredMask, remember, structure_of
from secateur.models.anatomy import text_config
from secateur.models.names import CheckpointMap
from secateur.models.position_bias import has_own_biases, uses_alibi
from secateur.models.saving import save_config_and_tokenizer, tied_names
from secateur.models.shards import SafetensorsFolder
from secateur.models.streaming import without_weights
from secateur.models.surgery import original_config, shrink
from secateur.models.unit_search import layout_of

MANIFEST = "pruning_manifest.json"
_FORMAT = 1
_FFN_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")


@dataclass
class Form:
    """How a pruned model is written.

    Attributes:
        config: what config.json says.
        architecture: name of the transformers class.
        stock: a stock checkpoint that needs no manifest to open.
        why: if not stock, what stands in the way; if stock by a trick, which.
    """

    config: Any
    architecture: str
    stock: bool
    why: str = ""


def form_of(model: nn.Module) -> Form:
    """The plainest form that says everything about ``model``."""
    original = original_config(model)
    name = (getattr(original, "architectures", None) or [type(model).__name__])[0]
    plain = Form(deepcopy(original), name, False)
    reason = _obstacle(model)
    if reason:
        plain.why = reason
        return plain
    config = _uniform_config(model, original)
    if isinstance(config, str):
        plain.why = config
        return plain
    candidates: list[tuple[Any, type[nn.Module], str]] = [(config, _class_of(model, name), "")]
    if getattr(original, "model_type", "") == "llama":
        from transformers import MistralForCausalLM

        candidates.append(
            (
                _as_mistral(config),
                MistralForCausalLM,
                "written as a Mistral model, which is the same computation: Llama's config "
                "refuses a width that its heads do not divide",
            )
        )
    for candidate, kind, note in candidates:
        if _fits(model, candidate, kind):
            return Form(candidate, kind.__name__, True, note)
    plain.why = "its config has no words for these widths"
    return plain


def _obstacle(model: nn.Module) -> str:
    """Why no config can describe the model, whatever its shapes."""
    mask = structure_of(model) or StructuredMask()
    layout = layout_of(model)
    if has_own_biases(model):
        what = "ALiBi slopes" if uses_alibi(model) else "position biases"
        return f"its heads keep their own {what}, which stock code computes from the head count"
    if uses_alibi(model) and any(a.key in mask.gone for a in layout.attentions):
        return "its ALiBi slopes follow from the number of heads"
    if "stem" in mask.gone and _scaled_by_width(model):
        return "its embeddings or logits are scaled by the original width"
    layers = any(path in mask.gone for path in layout.lists)
    if layers and getattr(text_config(model), "scale_attn_by_inverse_layer_idx", False):
        return "its attention is scaled by the number of the layer"
    return ""


def _scaled_by_width(model: nn.Module) -> bool:
    scaled = any(
        hasattr(m, "scalar_embed_scale") or hasattr(m, "embed_scale") for m in model.modules()
    )
    return scaled or hasattr(model, "model_dim")


def _uniform_config(model: nn.Module, original: Any) -> Any:
    """The original config with the present widths, or why they cannot be said."""
    layout = layout_of(model)
    now = text_config(model)
    config = deepcopy(original)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    widths: dict[str, set[Any]] = {
        "head counts": {(a.heads, a.kv_heads, a.head_dim) for a in layout.attentions},
        "MLP widths": {m.width for m in layout.mlps},
    }
    for what, found in widths.items():
        if len(found) > 1:
            return f"its layers have different {what}"
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    fields: dict[str, Any] = {}
    for heads, kv_heads, head_dim in widths["head counts"]:
        hidden = embedding.weight.shape[1]
        fields["num_attention_heads"] = heads
        for name in ("num_key_value_heads", "num_kv_heads"):
            if getattr(text, name, None) is not None:
                fields[name] = kv_heads
        if getattr(text, "head_dim", None) is not None or heads * head_dim != hidden:
            fields["head_dim"] = head_dim
        for side in ("encoder", "decoder"):
            if hasattr(text, f"{side}_attention_heads"):
                fields[f"{side}_attention_heads"] = heads
    for width in widths["MLP widths"]:
        for name in _FFN_FIELDS:
            if hasattr(text, name):
                fields[name] = width
        for side in ("encoder", "decoder"):
            if hasattr(text, f"{side}_ffn_dim"):
                fields[f"{side}_ffn_dim"] = width
    mask = structure_of(model)
    if mask is not None and "stem" in mask.gone:
        fields["hidden_size"] = embedding.weight.shape[1]
        if hasattr(text, "word_embed_proj_dim"):
            fields["word_embed_proj_dim"] = embedding.weight.shape[1]
        eps = {
            getattr(m, "variance_epsilon", None) or getattr(m, "eps", None)
            for m in model.modules()
            if "RMSNorm" in type(m).__name__ and m.weight.shape == (embedding.weight.shape[1],)
        } - {None}
        if len(eps) == 1 and hasattr(text, "rms_norm_eps"):
            fields["rms_norm_eps"] = eps.pop()
    for name in ("num_hidden_layers", "layer_types", "no_rope_layers"):
        if getattr(now, name, None) is not None:
            fields[name] = deepcopy(getattr(now, name))
    try:
        for name, value in fields.items():
            setattr(text, name, value)
    except Exception as error:  # strict configs validate on assignment
        return f"its config refuses the widths ({str(error).splitlines()[0]})"
    return config


def _as_mistral(config: Any) -> Any:
    from transformers import MistralConfig

    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "mlp_bias"):
        values.pop(name, None)
    values.pop("pretraining_tp", None)
    return MistralConfig(**values, sliding_window=None)


def _class_of(model: nn.Module, name: str) -> type[nn.Module]:
    import transformers

    return getattr(transformers, name, type(model))


def _fits(model: nn.Module, config: Any, kind: Any) -> bool:
    """A model built from ``config`` has exactly the tensors of ``model``."""
    try:
        again = type(config).from_dict(config.to_dict())
        skeleton = without_weights(lambda: kind(again))
    except Exception:  # many configs and constructors refuse odd widths, each in its own way
        return False
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    return wanted == {n: tuple(t.shape) for n, t in skeleton.state_dict().items()}


def save_words(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    facts: dict[str, Any],
    stored: torch.dtype | None = None,
    form: Form | None = None,
) -> None:
    """Config and tokenizer, and the manifest of a model that lost units; weights come apart.

    Args:
        facts: entries for the manifest (how it was pruned).
        stored: the type the weights are written in, if another than they have.
        form: what ``form_of(model)`` gave, if it is known already.
    """
    if structure_of(model) is None:
        save_config_and_tokenizer(model, tokenizer, folder, stored)
        return
    form = form or form_of(model)
    write_manifest(folder, model, form, facts)
    own: Any = model.config
    model.config = form.config
    try:
        save_config_and_tokenizer(model, tokenizer, folder, stored, form.architecture)
    finally:
        model.config = own


# -- the manifest -------------------------------------------------------------------------------


def write_manifest(folder: Path, model: nn.Module, form: Form, facts: dict[str, Any]) -> None:
    """``pruning_manifest.json``: what is gone of which model, and how the folder is to be opened."""
    mask = structure_of(model) or StructuredMask()
    original = original_config(model)
    layout = layout_of(model)
    record = {
        "format": _FORMAT,
        "secateur": __version__,
        "stock": form.stock,
        "why": form.why,
        "architecture": (getattr(original, "architectures", None) or [type(model).__name__])[0],
        "original_config": {k: v for k, v in original.to_dict().items() if not k.startswith("_")},
        "widths": {
            **{a.key: {"heads": a.heads, "kv_heads": a.kv_heads} for a in layout.attentions},
            **{m.key: {"channels": m.width} for m in layout.mlps},
        },
        **mask.record(),
        **facts,
    }
    write_json(folder / MANIFEST, record)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None if it has none.

    Raises:
        UsageError: damaged, or of a later version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        known = int(record["format"])
        whole = (
            isinstance(record["stock"], bool)
            and isinstance(record["architecture"], str)
            and isinstance(record["original_config"]["model_type"], str)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"not a pruning manifest ({type(error).__name__}: {error})",
            field="manifest",
            value=str(path),
            fix="take the one its run wrote",
        ) from None
    if known > _FORMAT:
        raise UsageError(
            f"written in format {known}, this version reads up to {_FORMAT}",
            field="manifest",
            value=str(path),
            fix="pip install -U secateur",
        )
    if not whole:
        raise UsageError(
            "not a pruning manifest: stock, architecture or original_config is no such thing",
            field="manifest",
            value=str(path),
            fix="take the one its run wrote",
        )
    return record


def restore_structure(model: nn.Module, manifest: dict[str, Any], folder: Path) -> None:
    """Note on a model opened from a stock folder what it has lost, so that numbers stay original."""
    mask = StructuredMask.parse(manifest, str(folder / MANIFEST))
    remember(model, mask)
    _check_record(model, mask, folder)
    model.__dict__["original_config"] = _config_of(manifest, folder)


def _check_record(model: Any, mask: StructuredMask, folder: Path) -> None:
    """Every group a manifest names is there, with as many units as it says."""
    layout = layout_of(model)
    found = {a.key: a.heads for a in layout.attentions} | {m.key: m.width for m in layout.mlps}
    found |= layout.lists | {"stem": int(model.get_input_embeddings().weight.shape[1])}
    for key, gone in mask.gone.items():
        kept = int((~gone).sum())
        if found.get(key, kept) != kept:
            raise VerificationError(
                f"'{key}' has {found[key]} units in '{folder}', its manifest says {kept}",
                fix=f"take config, {MANIFEST} and weights of the same run",
            )


def _config_of(manifest: dict[str, Any], folder: Path) -> Any:
    from transformers import AutoConfig

    values = dict(manifest["original_config"])
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:
        raise UsageError(
            f"its original config is not understood ({str(error).splitlines()[0]})",
            field="manifest",
            value=str(folder / MANIFEST),
        ) from None


def load_structured(
    folder: Path,
    manifest: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """Build the model a manifest describes and fill it from the folder.

    Args:
        folder: with config.json, the manifest and safetensors.
        dtype: None: as stored.
        device: where to put it.
        trust_remote_code: only for models that shipped code of their own.
        attn_implementation: ``sdpa`` or ``eager``; None: transformers chooses.

    Raises:
        UsageError: the manifest does not fit the config (unknown groups, other sizes).
        VerificationError: the weights do not fit the manifest.
    """
    config = _config_of(manifest, folder)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    mask = StructuredMask.parse(manifest, str(folder / MANIFEST))
    tensors = SafetensorsFolder(folder)
    kind = dtype or _most_common(tensors)
    model = without_weights(
        lambda: _build(manifest["architecture"], config, kind, trust_remote_code)
    )
    shrink(model, mask)
    _fill(model, CheckpointMap(model, tensors), folder, kind)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def _build(architecture: str, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    import transformers

    kind: Any = getattr(transformers, architecture, None)
    if kind is not None and hasattr(kind, "_from_config"):
        return kind._from_config(config, dtype=dtype)
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _most_common(tensors: SafetensorsFolder) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for name in tensors.names():
        if tensors.dtype(name).is_floating_point:
            sizes[tensors.dtype(name)] = sizes.get(tensors.dtype(name), 0) + 1
    return max(sizes, key=lambda d: sizes[d], default=torch.float32)


def _fill(model: Any, names: CheckpointMap, folder: Path, dtype: torch.dtype) -> None:
    tied = tied_names(model)
    used = {source for recipe in names.recipes.values() for source, _ in recipe.sources}
    spare = [n for n in names.tensors.names() if n not in used and n not in tied]
    if spare:
        raise VerificationError(
            f"'{folder}' holds '{spare[0]}', which its manifest says is gone",
            fix=f"take config, {MANIFEST} and weights of the same run",
        )
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in tied:
            continue
        try:
            tensor = names.read([name])[name]
        except SecateurError:
            if leaf in module._buffers:
                continue
            raise VerificationError(
                f"'{folder}' holds no weights for '{name}'",
                fix=f"take config, {MANIFEST} and weights of the same run",
            ) from None
        if tuple(tensor.shape) != tuple(value.shape):
            raise VerificationError(
                f"'{name}' is {tuple(tensor.shape)} in '{folder}', its manifest says "
                f"{tuple(value.shape)}",
                fix=f"take config, {MANIFEST} and weights of the same run",
            )
        _put(module, leaf, tensor, dtype)
    model.tie_weights()


def _put(module: nn.Module, leaf: str, tensor: Tensor, dtype: torch.dtype) -> None:
    value = tensor.to(dtype) if tensor.is_floating_point() else tensor
    old = module._parameters.get(leaf)
    if old is not None:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = value
