"""Multiple choice: the answer a model finds likeliest, as the usual harnesses score it.

Each answer's log-likelihood given the question is summed over its tokens; ``accuracy``
compares the sums, ``accuracy_norm`` the sums divided by the answers' length in bytes (which
does not favour short answers). The prompts are those of the common evaluation harness
(lm-eval), so figures are close to its ``acc`` and ``acc_norm``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.corpora import data_folder
from secateur.data.windows import text_ids, tokenizer_fingerprint
from secateur.errors import UsageError
from secateur.evaluation.perplexity import Logits
from secateur.progress import SILENT, Progress
from secateur.registry import Registry

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Question:
    """A context (may be empty), its possible continuations, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int
    group: str = ""


def choice_accuracy(
    logits_of: Logits,
    tokenizer: Any,
    task: str,
    *,
    limit: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Accuracy on a named task whose files lie in the data folder.

    Args:
        logits_of: token ids (B, L) to logits (B, L, V); ids are padded on the right.
        task: ``piqa`` or ``blimp``.
        limit: at most so many questions, spread evenly over the task.

    Returns:
        ``accuracy``, ``stderr``, ``accuracy_norm``, ``questions``, ``chance``, ``groups``
        (accuracy of each paradigm, for BLiMP) and ``protocol``.

    Raises:
        UsageError: unknown task, or its files are not there.
    """
    questions = TASKS[task]()
    if limit is not None:
        if limit < 1:
            raise UsageError("must be at least 1", field="limit", value=limit)
        step = max(1.0, len(questions) / limit)
        questions = [questions[int(i * step)] for i in range(min(limit, len(questions)))]
    return score(logits_of, tokenizer, questions, task=task, progress=progress)


def score(
    logits_of: Logits,
    tokenizer: Any,
    questions: list[Question],
    *,
    task: str = "choice",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Accuracy on ``questions``; see ``choice_accuracy``."""
    texts = [(q.context, choice) for q in questions for choice in q.choices]
    likelihoods = iter(log_likelihoods(logits_of, tokenizer, texts, progress))
    right, right_norm = [], []
    groups: dict[str, list[bool]] = {}
    for question in questions:
        sums = [next(likelihoods) for _ in question.choices]
        norms = [
            value / max(1, len(choice.encode()))
            for value, choice in zip(sums, question.choices, strict=True)
        ]
        right.append(sums.index(max(sums)) == question.answer)
        right_norm.append(norms.index(max(norms)) == question.answer)
        groups.setdefault(question.group, []).append(right[-1])
    accuracy = sum(right) / len(right)
    content = json.dumps([(q.context, q.choices, q.answer) for q in questions])
    return {
        "task": task,
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / max(1, len(right) - 1)),
        "accuracy_norm": sum(right_norm) / len(right),
        "questions": len(right),
        "chance": sum(1 / len(q.choices) for q in questions) / len(questions),
        "groups": {name: sum(hits) / len(hits) for name, hits in groups.items() if name},
        "protocol": {
            "task": task,
            "questions": len(right),
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
            "shots": 0,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        },
    }


def log_likelihoods(
    logits_of: Logits,
    tokenizer: Any,
    texts: list[tuple[str, str]],
    progress: Progress = SILENT,
) -> list[float]:
    """log P(continuation | context) in nats for each pair, summed over the continuation's tokens.

    With an empty context the continuation is scored from the BOS token on (EOS where a
    tokenizer has none), as the harnesses do.
    """
    encoded = [_encode(tokenizer, context, continuation) for context, continuation in texts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]), reverse=True)
    results = [0.0] * len(encoded)
    with progress.stage("choices", total=len(encoded), unit="answers") as advance:
        while order:
            size = max(1, BATCH_TOKENS // len(encoded[order[0]][0]))
            batch, order = order[:size], order[size:]
            rows = [encoded[i] for i in batch]
            ids = torch.zeros(len(rows), len(rows[0][0]), dtype=torch.int64)
            for row, (tokens, _) in enumerate(rows):
                ids[row, : len(tokens)] = torch.tensor(tokens)
            logits = logits_of(ids)
            for row, (tokens, first) in enumerate(rows):
                results[batch[row]] = _log_likelihood(logits[row], tokens, first)
            advance(len(batch))
    return results


def _log_likelihood(logits: Tensor, tokens: list[int], first: int) -> float:
    """Sum of log P(tokens[i] | before) for i >= ``first``; ``logits`` (L, V) may be padded."""
    relevant = torch.log_softmax(logits[first - 1 : len(tokens) - 1].float(), -1)
    targets = torch.tensor(tokens[first:], device=relevant.device)
    return float(relevant.gather(-1, targets[:, None]).double().sum())


def _encode(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """All tokens, and the place of the continuation's first.

    A space between the two belongs to the continuation, where tokenizers expect it.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = text_ids(tokenizer, stripped + continuation)
    first = len(text_ids(tokenizer, stripped)) if stripped else 0
    bos = getattr(tokenizer, "bos_token_id", None)
    if first == 0:
        begins = bool(whole) and whole[0] == bos
        start = bos if bos is not None else tokenizer.eos_token_id
        return (whole, 1) if begins else ([start, *whole], 1)
    return whole, min(first, len(whole) - 1)


def _piqa() -> list[Question]:
    """PIQA's validation questions: the likelier of two ways to reach a goal."""
    folder = _folder("piqa")
    rows = _lines(folder / "valid.jsonl")
    labels = (folder / "valid-labels.lst").read_text(encoding="utf-8").split()
    return [
        Question(
            f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(y)
        )
        for row, y in zip(rows, labels, strict=True)
    ]


def _blimp() -> list[Question]:
    """BLiMP's minimal pairs: the grammatical sentence should be the likelier one."""
    return [
        Question("", (row["sentence_good"], row["sentence_bad"]), 0, file.stem)
        for file in sorted(_folder("blimp").glob("*.jsonl"))
        for row in _lines(file)
    ]


TASKS: Registry[Callable[[], list[Question]]] = Registry("task", {"piqa": _piqa, "blimp": _blimp})


def _folder(name: str) -> Path:
    base = data_folder()
    if base is None or not (base / name).is_dir():
        raise UsageError(
            "the task's files are not here",
            field="task",
            value=name,
            fix=f"put them in a folder {name}/ and name the folder above it in SECATEUR_DATA",
        )
    return base / name


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UsageError("the task's file is not here", field="task", value=str(path))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
