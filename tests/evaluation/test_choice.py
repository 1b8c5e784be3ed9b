"""Multiple choice: likelihoods against their definition, prompts, and the real tasks if present."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.data.corpora import data_folder
from secateur.errors import UsageError
from secateur.evaluation import choice
from secateur.evaluation.choice import Question, choice_accuracy, log_likelihoods, score
from secateur.models.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [("ab", " cd"), ("", "hello"), ("a longer context here", " x"), ("trailing ", "space")]


@pytest.fixture(scope="module")
def logits():
    model = tiny_model("llama")

    @torch.no_grad()
    def of(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return of


def _by_hand(logits, context: str, continuation: str) -> float:
    if context.endswith(" "):  # the space counts with what follows it
        context, continuation = context[:-1], " " + continuation
    before = TOKENIZER(context)["input_ids"] or [TOKENIZER.bos_token_id]
    after = TOKENIZER(continuation)["input_ids"]
    total = 0.0
    for i, token in enumerate(after):
        step = logits(torch.tensor([before + after[:i]]))[0, -1]
        total += float(step.double().log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_likelihoods_against_token_by_token(
    logits, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "BATCH_TOKENS", tokens)
    expected = [_by_hand(logits, *pair) for pair in PAIRS]
    assert log_likelihoods(logits, TOKENIZER, PAIRS) == pytest.approx(expected, rel=1e-4)


def _prefers(text: str):
    """A model that finds the letters of ``text`` likely and all others not."""
    liked = torch.zeros(264)
    liked[TOKENIZER(text)["input_ids"]] = 5

    return lambda ids: liked.expand(*ids.shape, -1)


def test_the_likelier_answer_is_taken() -> None:
    questions = [Question("q", (" aa", " bb"), 0), Question("q", (" bb", " aa"), 0, "g")]
    result = score(_prefers("a"), TOKENIZER, questions)
    assert result["accuracy"] == 0.5
    assert result["groups"] == {"g": 0.0}
    assert (result["questions"], result["chance"]) == (2, 0.5)


def test_length_normalisation_does_not_favour_short_answers() -> None:
    questions = [Question("q", ("b", "aaaaaaaaaaaaaaaaaaaa"), 1)]
    result = score(_prefers("a"), TOKENIZER, questions)
    assert (result["accuracy"], result["accuracy_norm"]) == (0, 1)


def _tasks_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "piqa").mkdir()
    rows = '{"goal": "g%d", "sol1": "aaa", "sol2": "bbb"}\n'
    (tmp_path / "piqa/valid.jsonl").write_text("".join(rows % i for i in range(4)))
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n1\n0\n0\n")
    (tmp_path / "blimp").mkdir()
    pair = '{"sentence_good": "aa", "sentence_bad": "bb"}\n'
    (tmp_path / "blimp/one.jsonl").write_text(pair * 3)
    (tmp_path / "blimp/two.jsonl").write_text(pair.replace("aa", "cc"))
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))


def test_tasks_are_read_from_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tasks_here(tmp_path, monkeypatch)
    result = choice_accuracy(_prefers("a"), TOKENIZER, "piqa")
    assert (result["accuracy"], result["questions"], result["task"]) == (0.75, 4, "piqa")
    few = choice_accuracy(_prefers("a"), TOKENIZER, "piqa", limit=2)
    assert few["questions"] == 2
    assert few["protocol"]["sha256"] != result["protocol"]["sha256"]
    blimp = choice_accuracy(_prefers("a"), TOKENIZER, "blimp")
    assert blimp["groups"]["one"] == 1.0


def test_missing_tasks_say_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(UsageError, match="SECATEUR_DATA"):
        choice_accuracy(_prefers("a"), TOKENIZER, "piqa")
    with pytest.raises(UsageError, match="did you mean 'blimp'"):
        choice_accuracy(_prefers("a"), TOKENIZER, "blimb")
    _tasks_here(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match="limit=0"):
        choice_accuracy(_prefers("a"), TOKENIZER, "piqa", limit=0)


def test_a_small_story_model_knows_some_grammar() -> None:
    folder = data_folder()
    if folder is None or not (folder / "blimp").is_dir():
        pytest.skip("needs stories260k and blimp in SECATEUR_DATA")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def of(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    result = choice_accuracy(of, AutoTokenizer.from_pretrained(path), "blimp", limit=200)
    assert result["accuracy"] - 2 * result["stderr"] > 0.5
    assert result["groups"]["irregular_past_participle_verbs"] > 0.8
