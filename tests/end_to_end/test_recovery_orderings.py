"""Recovery of a really trained small model: only the orderings that theory or every run support."""

import copy

import pytest
import torch

import secateur
from secateur.data.windows import evaluation_windows, training_windows
from secateur.evaluation.perplexity import perplexity
from secateur.models.anatomy import ModelView
from secateur.models.loading import load
from secateur.training.perp import perp
from secateur.training.settings import TrainSettings


@pytest.fixture(scope="module")
def cut():
    loaded = load("tiny")
    result = secateur.prune(
        loaded.model, loaded.tokenizer, method="magnitude", sparsity=0.75, samples=2, length=64
    )
    train = training_windows("pydoc", loaded.tokenizer, 40_000, 96)
    test = evaluation_windows("pydoc:test", loaded.tokenizer, 96, 16)
    return loaded.model, {n: result.masks[n] for n in result.masks}, train, test


def measured(model, windows):
    def logits(ids):
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return perplexity(logits, windows).value


@pytest.mark.slow
def test_a_little_training_helps_and_masked_adapters_help_more(cut):
    model, masks, train, test = cut
    figures = {"none": measured(model, test)}
    settings = TrainSettings(steps=30, lr=3e-3, batch=8, checkpoint_every=None)
    for name, trained in (("norms", ["norms"]), ("mask-lora", ["norms", "mask-lora"])):
        mended = copy.deepcopy(model)
        record = perp(
            ModelView.of(mended), masks, train, settings, train=trained,
            adapter={"rank": 8} if name == "mask-lora" else {},
        )  # fmt: skip
        figures[name] = measured(mended, test)
        if name == "norms":
            assert record["share"] < 0.01
    assert figures["norms"] < figures["none"]
    assert figures["mask-lora"] < figures["norms"]
