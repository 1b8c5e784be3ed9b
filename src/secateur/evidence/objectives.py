"""What a model is judged by, sample by sample: losses for gradients and for ablation.

An objective runs the model on a batch (tensors by name, samples along the first dimension) and
returns one value a sample, (B,), lower = better. Samples must not meet in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.samples import IGNORED
from secateur.errors import UsageError

Batch = Mapping[str, Tensor]
Objective = Callable[[nn.Module, Batch], Tensor]


def language_model(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token cross-entropy (nats) of each sequence; ``input_ids``, ``attention_mask``."""
    from secateur.evidence.gradients import sequence_losses

    mask = batch.get("attention_mask")
    keep = None if mask is None or bool(mask.all()) else mask.bool()
    extra = {} if keep is None else {"attention_mask": keep.long()}
    logits = model(input_ids=batch["input_ids"], use_cache=False, **extra).logits
    return sequence_losses(logits, batch["input_ids"], keep)


def sequence_to_sequence(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats) of each target; needs ``labels`` (B, L), ``IGNORED`` = padding.

    Raises:
        UsageError: the batch holds no labels.
    """
    labels = _labels(batch)
    fed = batch.get("decoder_input_ids")
    if fed is None:
        fed = shifted_right(model, labels)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
    logits = model(**inputs, decoder_input_ids=fed, use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """What a decoder is fed to predict ``labels``: its start token, then all but the last."""
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise UsageError(
            "the config names no decoder_start_token_id",
            field="model",
            value=type(model).__name__,
            fix="give decoder_input_ids in the batch",
        )
    pad = getattr(config, "pad_token_id", None)
    fed = labels.roll(1, 1).masked_fill(labels.roll(1, 1) == IGNORED, pad or 0)
    fed[:, 0] = start
    return fed


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy (nats) of each sample's class; needs ``labels`` (B,).

    Raises:
        UsageError: the batch holds no labels.
    """
    labels = _labels(batch)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def feature_probe(seed: int = 0) -> Objective:
    """An objective for encoders without labels: how far the pooled features move.

    Each sample's pooled feature f(x) (mean over real tokens) is projected on a Gaussian
    direction v of its own: <v, f(x)>. The gradient of that with respect to a gate has the
    expected square |df/dxi|^2 over v, so gates are ranked by what they do to the features.
    (The distance to the dense features would not do: its gradient is zero at the dense model.)
    Only for gradients, not for ablation: the value itself means nothing.
    """

    def probe(model: nn.Module, batch: Batch) -> Tensor:
        pooled = pooled_features(model, batch)
        generator = torch.Generator().manual_seed(seed)
        width = pooled.shape[-1]
        # Keyed by content, so that the order and the size of batches change nothing.
        keys = [_content_key(batch, row) for row in range(len(pooled))]
        rows = [
            torch.randn(width, generator=generator.manual_seed(seed * 1_000_003 + key))
            for key in keys
        ]
        return (torch.stack(rows).to(pooled) * pooled).sum(-1)

    return probe


def pooled_features(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over real tokens of the last hidden states, (B, d)."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden: Tensor = getattr(model, "base_model", model)(**inputs).last_hidden_state
    mask = batch.get("attention_mask")
    if mask is None:
        return hidden.mean(1)
    weight = mask.to(hidden).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def objective_for(model: nn.Module, batch: Batch) -> Objective:
    """The objective a model and its data suggest.

    An encoder-decoder: ``sequence_to_sequence``; labels of one class a sample:
    ``classification``; a causal language model: ``language_model``; any other encoder:
    ``feature_probe``.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return sequence_to_sequence
    if "labels" in batch:
        return classification
    causal = type(model).__name__.endswith(("CausalLM", "LMHeadModel"))
    return language_model if causal else feature_probe()


def _content_key(batch: Batch, row: int) -> int:
    ids = batch["input_ids"][row]
    mask = batch.get("attention_mask")
    real = ids if mask is None else ids[mask[row].bool()]
    key = 0
    for token in real.tolist():
        key = (key * 31 + int(token)) % 2_147_483_647
    return key


def _labels(batch: Batch) -> Tensor:
    if "labels" not in batch:
        raise UsageError(
            "the objective needs labels",
            field="calibration",
            value=sorted(batch),
            fix="give batches with a 'labels' tensor",
        )
    return batch["labels"]
