"""Trains a small encoder-decoder on synthetic pairs, to prune attention heads of.

    python tools/train_seq2seq.py --out OUT              # about 6 minutes on one CPU core

A source is a task's token and 6 to 12 letters; the target is the letters copied, reversed,
sorted, swapped pairwise, or each replaced by the next of the alphabet. Every task needs the
attention from decoder to encoder; sorting and reversing need the others too. There is no end
of data, so held-out pairs are simply drawn with another seed. Writes config.json,
model.safetensors and MODEL_CARD.json. Same seed, machine and libraries give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.samples import IGNORED
from secateur.evidence.objectives import sequence_to_sequence, shifted_right
from secateur.files import write_text
from secateur.progress import RichProgress

PAD, START, END = 0, 1, 2
TASKS = ("copy", "reverse", "sort", "swap", "next")
FIRST_TASK = 3
FIRST_LETTER = FIRST_TASK + len(TASKS)
LETTERS = 26
VOCABULARY = FIRST_LETTER + LETTERS
SHORTEST, LONGEST = 6, 12


@dataclass(frozen=True)
class Settings:
    """How it is trained; goes into the model card as it is."""

    steps: int = 2500
    batch: int = 64
    rate: float = 2e-3
    warmup: float = 0.1
    width: int = 64
    heads: int = 8
    layers: int = 3
    ffn: int = 128
    seed: int = 0


def pairs(count: int, seed: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of ``count`` pairs, tasks in turn."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    letters = torch.randint(0, LETTERS, (count, LONGEST), generator=generator)
    sources = torch.full((count, LONGEST + 2), PAD)
    labels = torch.full((count, LONGEST + 1), IGNORED)
    for row, length in enumerate(lengths):
        task = row % len(TASKS)
        word = letters[row, :length]
        answer = answer_to(TASKS[task], word)
        sources[row, 0] = FIRST_TASK + task
        sources[row, 1 : length + 1] = word + FIRST_LETTER
        sources[row, length + 1] = END
        labels[row, :length] = answer + FIRST_LETTER
        labels[row, length] = END
    return {"input_ids": sources, "attention_mask": (sources != PAD).long(), "labels": labels}


def answer_to(task: str, word: Tensor) -> Tensor:
    """What a task makes of letters numbered from 0, (length,)."""
    if task == "reverse":
        return word.flip(0)
    if task == "sort":
        return word.sort().values
    if task == "swap":
        even = len(word) // 2 * 2
        swapped = word.clone()
        swapped[0:even:2], swapped[1:even:2] = word[1:even:2], word[0:even:2]
        return swapped
    return (word + 1) % LETTERS if task == "next" else word


def token_errors(model: nn.Module, batch: Any) -> Tensor:
    """Share of each target's tokens predicted wrongly (the target so far being given), (B,)."""
    labels = batch["labels"]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = model(**inputs, decoder_input_ids=shifted_right(model, labels), use_cache=False).logits
    real = labels != IGNORED
    wrong = (logits.argmax(-1) != labels) & real
    return wrong.sum(1) / real.sum(1)


def new_model(settings: Settings) -> Any:
    """A BART of the size asked for, newly initialised."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(settings.seed)
    s = settings
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=s.width,
        encoder_layers=s.layers,
        decoder_layers=s.layers,
        encoder_attention_heads=s.heads,
        decoder_attention_heads=s.heads,
        encoder_ffn_dim=s.ffn,
        decoder_ffn_dim=s.ffn,
        max_position_embeddings=LONGEST + 4,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def train(out: Path, settings: Settings) -> dict[str, Any]:
    """Train, save to ``out``, and return the model card."""
    model = new_model(settings).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.01)
    rise = max(1, int(settings.steps * settings.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda n: min((n + 1) / rise, (settings.steps - n) / max(1, settings.steps - rise)),
    )
    start = time.perf_counter()
    with RichProgress().stage("training", total=settings.steps, unit="steps") as advance:
        for step in range(settings.steps):
            batch = pairs(settings.batch, seed=1_000_000 * (settings.seed + 1) + step)
            optimiser.zero_grad()
            loss = sequence_to_sequence(model, batch).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            advance(1)
            if step % 250 == 249:
                print(f"step {step + 1}: loss {float(loss.detach()):.4f}", flush=True)
    model.eval()
    held_out = pairs(1000, seed=7)
    with torch.no_grad():
        errors = token_errors(model, held_out)
    card = {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "token_accuracy": round(1 - float(errors.mean()), 4),
        "by_task": {
            task: round(1 - float(errors[n :: len(TASKS)].mean()), 4)
            for n, task in enumerate(TASKS)
        },
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__.split("+")[0],
    }
    model.save_pretrained(out)
    write_text(out / "MODEL_CARD.json", json.dumps(card, indent=2) + "\n")
    return card


def main() -> None:
    """The command line: one option a setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = vars(parser.parse_args())
    print(json.dumps(train(given.pop("out"), Settings(**given)), indent=2))


if __name__ == "__main__":
    main()
