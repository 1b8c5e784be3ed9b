"""Trains secateur-tiny: a small Llama on public-domain text, so that tests meet a real model.

    python tools/train_tiny.py --prepare .texts             # needs the network, once
    python tools/train_tiny.py --text-dir .texts --tokens 160e6 --out OUT

Writes config.json, model.safetensors (bfloat16), the tokenizer and MODEL_CARD.json. The last
tenth of every corpus is held out. Same seed, machine and libraries give the same weights on
a CPU; on a GPU, sums in another order make them differ in the last digits.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.data.corpora import (
    CORPORA,
    corpus_documents,
    digest,
    joined,
)
from secateur.data.texts import head_and_tail, read_documents
from secateur.files import write_text
from secateur.progress import RichProgress

REPEATS = {"pydoc": 4, "sotu": 1, "shakespeare": 1, "moby-dick": 1, "austen": 1}
"""Training corpora, and how often each is seen in a pass: pydoc, the default calibration
text, is small and unlike the others."""
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
VOCABULARY = 2048
GLANCE = 24
"""Held-out windows a corpus looked at while training; the end measures all of them."""


@dataclass(frozen=True)
class Settings:
    """How it is trained; goes into the model card as it is."""

    tokens: float = 160e6
    minutes: float = math.inf
    length: int = 512
    batch: int = 64
    rate: float = 3e-3
    warmup: float = 0.03
    weight_decay: float = 0.1
    held_out: float = 0.1
    evaluations: int = 12
    seed: int = 0


def main() -> None:
    """The command line."""
    arguments = _arguments()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    given = {k: v for k, v in vars(arguments).items() if k in Settings.__dataclass_fields__}
    train(arguments.text_dir, arguments.out, Settings(**given), arguments.device, arguments.compile)


def prepare(folder: Path) -> None:
    """Fetch and clean the training corpora into ``folder/NAME.txt``."""
    for name in REPEATS:
        documents = corpus_documents(CORPORA[name], progress=RichProgress())
        write_text(folder / f"{name}.txt", joined(documents))
        print(f"{name}: {len(documents)} documents, sha256 {digest(documents)}")


def train(folder: Path | None, out: Path, settings: Settings, device: str, compiled: bool) -> None:
    """Tokenise, train, measure on the held-out tails, save."""
    torch.manual_seed(settings.seed)
    started = time.monotonic()
    corpora = _corpora(folder)
    parts = {name: head_and_tail(docs, settings.held_out) for name, docs in corpora.items()}
    tokenizer = train_tokenizer([text for head, _ in parts.values() for text in head])
    train_ids = {n: tokenised(tokenizer, head).to(device) for n, (head, _) in parts.items()}
    held_ids = {n: tokenised(tokenizer, tail).to(device) for n, (_, tail) in parts.items()}
    stream = torch.cat([ids for n, ids in train_ids.items() for _ in range(REPEATS[n])])
    print(f"{len(stream):,} tokens a pass, {device}, ready in {time.monotonic() - started:.0f} s")

    model = LlamaForCausalLM(_configuration(settings.length))
    model.to(torch.device(device))  # type: ignore[arg-type]
    best, history, seen = fit(model, stream, held_ids, settings, compiled)
    model.load_state_dict(best)
    model.to(torch.bfloat16)  # what is saved is what is measured, in float32 arithmetic
    saved = model.state_dict()
    model.to(torch.float32)
    quality = {name: math.exp(_loss(model, ids, settings.length)) for name, ids in held_ids.items()}
    model.load_state_dict(saved)
    card = {
        "name": "secateur-tiny",
        "licence": "Apache-2.0",
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": {k: v for k, v in asdict(settings).items() if v != math.inf},
        "tokens_seen": seen,
        "tokens_a_pass": len(stream),
        "corpora": {
            name: {
                "licence": CORPORA[name].licence,
                "source": CORPORA[name].source,
                "sha256": digest(documents),
                "repeats": REPEATS[name],
                "held_out_tokens": len(held_ids[name]),
                "held_out_perplexity": round(quality[name], 3),
            }
            for name, documents in corpora.items()
        },
        "held_out_protocol": f"last {settings.held_out:.0%} of each corpus, windows of "
        f"{settings.length} tokens without overlap, bfloat16 weights, float32 arithmetic",
        "history": history,
        "seconds": round(time.monotonic() - started),
        "made_with": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        },
    }
    save(model.to(torch.bfloat16), tokenizer, card, out)
    print(json.dumps({name: round(value, 2) for name, value in quality.items()}), "->", out)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 pieces that puts ``<s>`` in front, like Llama's."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[UNK, BOS, EOS], initial_alphabet=alphabet
    )
    inner.train_from_iterator((p for text in texts for p in text.split("\n\n")), trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=Settings.length,
        clean_up_tokenization_spaces=False,
    )


def tokenised(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents as one stream of ids, each between BOS and EOS."""
    encoded = tokenizer(documents)["input_ids"]  # BOS is put in front
    return torch.tensor([i for ids in encoded for i in [*ids, tokenizer.eos_token_id]])


def fit(
    model: LlamaForCausalLM,
    stream: Tensor,
    held_ids: dict[str, Tensor],
    settings: Settings,
    compiled: bool,
) -> tuple[dict[str, Tensor], list[dict[str, float]], int]:
    """AdamW with warm-up and cosine decay on random windows; the best held-out state wins.

    The schedule follows whichever budget runs out first, tokens or minutes.
    """
    device = stream.device
    draw = torch.Generator(device=device).manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    forward = _compiled(model, stream, settings) if compiled else model
    offsets = torch.arange(settings.length, device=device)
    glance = {name: ids[: GLANCE * settings.length] for name, ids in held_ids.items()}
    started, seen, next_report = time.monotonic(), 0, 0.0
    best: dict[str, Tensor] = {}
    best_loss, history = math.inf, []
    while True:
        spent = (time.monotonic() - started) / 60 / settings.minutes
        done = min(1.0, max(seen / settings.tokens, spent))
        if done >= min(1.0, next_report):
            next_report = done + 1 / settings.evaluations
            looked = time.monotonic()
            mean = sum(_loss(model, i, settings.length) for i in glance.values()) / len(glance)
            speed = seen / max(1e-9, looked - started)
            history.append({"tokens": seen, "held_out_loss": round(mean, 4)})
            print(
                f"{done:5.0%} {seen:>12,} tokens {speed:>9,.0f}/s  held-out {mean:.4f}", flush=True
            )
            if mean < best_loss:
                best_loss = mean
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            started += time.monotonic() - looked  # the budget is for training
        if done >= 1:
            return best, history, seen
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * _schedule(done, settings.warmup)
        first = torch.randint(
            len(stream) - settings.length, (settings.batch, 1), generator=draw, device=device
        )
        ids = stream[first + offsets]
        ids[: settings.batch // 2, 0] = 1  # half of the windows begin like a text of their own
        with _autocast(device):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: dict[str, object], out: Path
) -> None:
    """Write the folder beside its place, then rename it."""
    temporary = out.with_name(f".{out.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "MODEL_CARD.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def _configuration(length: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def _corpora(folder: Path | None) -> dict[str, list[str]]:
    if folder is None:
        return {n: corpus_documents(CORPORA[n], progress=RichProgress()) for n in REPEATS}
    return {name: read_documents(folder / f"{name}.txt") for name in REPEATS}


def _schedule(done: float, warmup: float) -> float:
    """The share of the top learning rate: up in a line, down in a half cosine to a tenth."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@torch.no_grad()
def _loss(model: LlamaForCausalLM, ids: Tensor, length: int, batch: int = 32) -> float:
    """Mean cross-entropy over windows without overlap, the remainder dropped."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    losses = [
        float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part)
        for part in windows.split(batch)
    ]
    return sum(losses) / len(windows)


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16)


def _compiled(model: LlamaForCausalLM, stream: Tensor, settings: Settings) -> LlamaForCausalLM:
    """The model through ``torch.compile``, or as it is where compiling it does not work."""
    compiled = torch.compile(model)
    ids = stream[: settings.length * settings.batch].view(settings.batch, -1)
    try:
        with _autocast(stream.device):
            compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except Exception as error:
        print(f"torch.compile does not work here ({type(error).__name__}); going on without")
        return model
    finally:
        model.zero_grad(set_to_none=True)
    return compiled  # type: ignore[return-value]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--prepare", type=Path, metavar="DIR", help="only fetch and clean the texts into DIR")
    add("--text-dir", type=Path, metavar="DIR", help="texts prepared before (default: fetch)")
    add("--out", type=Path, default=Path("src/secateur/models/assets/tiny"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="use torch.compile where it works")
    for field in Settings.__dataclass_fields__.values():
        kind = type(field.default)
        flag = f"--{field.name.replace('_', '-')}"
        add(flag, type=kind, default=field.default, help=f"default {field.default}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
