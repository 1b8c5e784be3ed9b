"""The small encoder-decoder's task is what it says, and its script writes a model that opens."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.train_seq2seq import (
    END,
    FIRST_LETTER,
    FIRST_TASK,
    LETTERS,
    TASKS,
    Settings,
    answer_to,
    pairs,
    train,
)


def by_hand(task, word):
    letters = [int(x) for x in word]
    if task == "copy":
        return letters
    if task == "reverse":
        return letters[::-1]
    if task == "sort":
        return sorted(letters)
    if task == "next":
        return [(x + 1) % LETTERS for x in letters]
    out = letters[:]
    for i in range(0, len(out) - 1, 2):
        out[i], out[i + 1] = out[i + 1], out[i]
    return out


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [6, 7, 12])
def test_answers(task, length):
    word = torch.randint(0, LETTERS, (length,), generator=torch.Generator().manual_seed(length))
    assert answer_to(task, word).tolist() == by_hand(task, word)


def test_pairs_are_their_answers_and_repeat_with_the_seed():
    drawn = pairs(20, seed=3)
    for row in range(20):
        source = drawn["input_ids"][row][drawn["attention_mask"][row].bool()].tolist()
        target = [t for t in drawn["labels"][row].tolist() if t >= 0]
        assert source[-1] == target[-1] == END
        task = TASKS[source[0] - FIRST_TASK]
        word = [t - FIRST_LETTER for t in source[1:-1]]
        assert [t - FIRST_LETTER for t in target[:-1]] == by_hand(task, word)
    assert all(
        torch.equal(a, b) for a, b in zip(drawn.values(), pairs(20, 3).values(), strict=True)
    )
    assert not torch.equal(drawn["labels"], pairs(20, 4)["labels"])


def test_a_short_training_is_saved(tmp_path):
    from transformers import BartForConditionalGeneration

    card = train(tmp_path / "out", Settings(steps=3, batch=8, width=16, heads=2, layers=1, ffn=16))
    assert json.loads((tmp_path / "out" / "MODEL_CARD.json").read_text()) == card
    model = BartForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
