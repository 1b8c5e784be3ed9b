"""Perplexity against a plain loss loop and published figures; agreement of two models."""

import math

import pytest
import torch
from torch import Tensor

from secateur.data.corpora import data_folder
from secateur.data.texts import load_text
from secateur.data.windows import Windows, calibration_windows, evaluation_windows
from secateur.errors import NumericsError, UsageError
from secateur.evaluation import perplexity as module
from secateur.evaluation.perplexity import fidelity, perplexity
from secateur.models.tiny import tiny_model, tiny_tokenizer

IDS = torch.randint(0, 264, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense():
    return _logits(tiny_model("llama"))


def _logits(model):
    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return logits


def test_it_equals_a_plain_loss_loop() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss for row in IDS]
    measured = perplexity(_logits(model), Windows(IDS))
    assert measured.value == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-6)
    assert measured.per_window.tolist() == pytest.approx(torch.stack(losses).tolist(), rel=1e-6)
    assert measured.protocol.tokens == 5 * 11


@pytest.mark.parametrize("tokens", [1, 24, 36, 10_000])
def test_batches_and_chunks_do_not_matter(
    dense, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = perplexity(dense, Windows(IDS)).value
    monkeypatch.setattr(module, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(module, "CHUNK", tokens)
    assert perplexity(dense, Windows(IDS)).value == pytest.approx(expected, rel=1e-6)


def test_padding_on_the_right_equals_shorter_windows(dense) -> None:
    lengths = [12, 5, 7, 2, 9]
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    padded = perplexity(dense, Windows(IDS.where(mask, 0), mask))
    losses, counts = [], []
    for row, n in zip(IDS, lengths, strict=True):
        alone = perplexity(dense, Windows(row[None, :n]))
        losses.append(float(alone.per_window[0]))
        counts.append(n - 1)
    mean = sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)
    assert padded.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert padded.per_window.tolist() == pytest.approx(losses, rel=1e-5)
    assert padded.protocol.tokens == sum(counts)


def test_padding_on_the_left_is_refused(dense) -> None:
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[2, 0] = False
    with pytest.raises(UsageError, match="left"):
        perplexity(dense, Windows(IDS, mask))


def test_a_uniform_model_has_the_vocabularys_perplexity() -> None:
    measured = perplexity(lambda ids: torch.zeros(*ids.shape, 300), Windows(IDS))
    assert measured.value == pytest.approx(300)
    assert measured.stderr == pytest.approx(0, abs=1e-6)
    assert measured.interval() == pytest.approx((300, 300))


def test_spread_over_windows(dense) -> None:
    measured = perplexity(dense, Windows(IDS))
    losses = measured.per_window
    assert measured.stderr == pytest.approx(measured.value * float(losses.std()) / 5**0.5)
    low, high = measured.interval()
    assert low < measured.value < high
    assert math.isnan(perplexity(dense, Windows(IDS[:1])).stderr)


def test_fidelity_of_a_model_with_itself(dense) -> None:
    both = fidelity(dense, dense, Windows(IDS))
    assert both["kl"] == pytest.approx(0, abs=1e-7)
    assert both["top1_agreement"] == 1
    assert both["dense"] == both["pruned"]
    assert both["dense"]["perplexity"] == perplexity(dense, Windows(IDS)).value


def test_fidelity_against_its_definition(dense) -> None:
    other = _logits(tiny_model("llama", seed=1))
    mask = torch.arange(12) < torch.tensor([12, 12, 5, 12, 8])[:, None]
    both = fidelity(dense, other, Windows(IDS, mask))
    p, q = (f(IDS)[:, :-1].double().log_softmax(-1) for f in (dense, other))
    keep = mask[:, 1:]
    kl = torch.nn.functional.kl_div(q[keep], p[keep], reduction="batchmean", log_target=True)
    assert both["kl"] == pytest.approx(float(kl), rel=1e-5)
    same = (p.argmax(-1) == q.argmax(-1))[keep].double().mean()
    assert both["top1_agreement"] == pytest.approx(float(same))
    assert both["pruned"]["perplexity"] == perplexity(other, Windows(IDS, mask)).value
    assert both["pruned"]["perplexity"] != both["dense"]["perplexity"]
    assert both["protocol"]["digest"] == perplexity(dense, Windows(IDS, mask)).protocol.digest


def test_logits_that_are_not_finite_name_the_window(dense) -> None:
    def broken(ids: Tensor) -> Tensor:
        logits = dense(ids)
        logits[(ids == IDS[3]).all(1)] = torch.nan
        return logits

    with pytest.raises(NumericsError, match="window 4 of 5"):
        perplexity(broken, Windows(IDS))
    with pytest.raises(NumericsError, match="the pruned model's"):
        fidelity(dense, broken, Windows(IDS))


def test_another_models_tokens_or_vocabulary_are_refused(dense) -> None:
    with pytest.raises(UsageError, match="vocabulary has 100 entries"):
        perplexity(lambda ids: torch.zeros(*ids.shape, 100), Windows(IDS))
    with pytest.raises(UsageError, match="264"):
        fidelity(dense, lambda ids: torch.zeros(*ids.shape, 300), Windows(IDS))


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    def sure_and_wrong(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 264)
        logits[..., 0] = 1e6
        return logits

    assert perplexity(sure_and_wrong, Windows(IDS.clamp(min=1))).value == math.inf


def test_half_precision_logits_are_named_in_the_protocol(dense) -> None:
    measured = perplexity(lambda ids: dense(ids).to(torch.bfloat16), Windows(IDS))
    assert measured.protocol.dtype == "bfloat16"
    assert measured.value == pytest.approx(perplexity(dense, Windows(IDS)).value, rel=0.02)


@pytest.fixture(scope="module")
def stories():
    folder = data_folder()
    if folder is None or not (folder / "stories260k").is_dir():
        pytest.skip("needs stories260k in SECATEUR_DATA")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return path, AutoTokenizer.from_pretrained(path), model


def test_stories260k_has_its_known_perplexity(stories) -> None:
    path, tokenizer, model = stories
    documents = load_text(path / "sample_texts.txt").documents
    assert len(documents) == 5
    rows = [tokenizer(document) for document in documents]
    windows = calibration_windows(rows, None, samples=5)
    assert perplexity(_logits(model), windows).value == pytest.approx(3.548, abs=5e-4)


def test_stories260k_in_windows_equals_the_models_own_loss(stories) -> None:
    path, tokenizer, model = stories
    windows = evaluation_windows(path / "sample_texts.txt", tokenizer, 256)
    assert windows.record["bos"] is True
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows.ids]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(_logits(model), windows).value == pytest.approx(expected, rel=1e-5)


def test_real_text_is_easier_than_noise_for_the_byte_tokenizer(dense) -> None:
    windows = evaluation_windows("pydoc", tiny_tokenizer(), 32, limit=4)
    assert perplexity(dense, windows).protocol.record()["dataset"] == "pydoc"
