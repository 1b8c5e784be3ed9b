"""Pruning-aware pretraining of really trained models: only orderings that hold by a wide margin."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import secateur
from secateur.data.windows import Windows
from secateur.models.loading import load
from secateur.training.loop import fit
from secateur.training.settings import TrainSettings


@torch.no_grad()
def measured(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.fixture(scope="module")
def stories(data_folder):
    """stories260k and windows that it wrote itself: to train on, and held out."""
    folder = data_folder / "stories260k"
    torch.manual_seed(0)
    writer = load(str(folder)).model
    ids = writer.generate(
        torch.full((320, 1), 1), do_sample=True, min_length=96, max_length=96, top_k=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return folder, Windows(ids[:280]), ids[280:]


def test_what_is_inherited_beats_the_same_shape_from_scratch(stories, tmp_path):
    """stories260k to 60 %: the found shape, trained as long from random weights, is far behind."""
    folder, text, held = stories
    dense = measured(load(str(folder)).model, held)
    result = secateur.pretrain(
        folder, text=text, keep_params=0.6, tokens=50 * 8 * 96, length=96, batch=8, lr=2e-3,
        prune_until=0.5, out=tmp_path / "out",
    )  # fmt: skip
    history = result.report["pretraining"]
    assert result.report["structure"]["parameters"]["after"] <= 0.6 * 260_032
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    small = measured(again, held)
    torch.manual_seed(0)
    scratch = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    fit(
        scratch, text,
        TrainSettings(steps=history["steps"], lr=4e-3, batch=8, schedule="cosine", warmup=0.02),
    )  # fmt: skip
    scratch.eval()
    assert dense < small < 0.75 * measured(scratch, held)
    # FFN channels are worth least by the parameter, the residual stream most: as in the paper.
    rows = {r["kind"]: r["removed"] / r["before"] for r in result.report["structure"]["groups"]}
    assert rows["ffn"] > rows["stem"]
