"""A Hugging Face tokenizer in GGUF's terms."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any


def add_vocabulary(gguf: ModuleType, writer: Any, folder: Path, size: int) -> list[str]:
    """Write the tokens of ``folder/tokenizer.json``; returns notes on what is uncertain.

    Byte-level BPE becomes llama.cpp's ``gpt2`` model with its merges, BPE with byte fallback
    becomes ``llama`` with the merge order as scores.

    Args:
        size: rows of the embedding; unused ones get placeholder tokens.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ["there is no tokenizer.json: the file holds no vocabulary"]
    described = json.loads(file.read_text("utf-8"))
    model = described["model"]
    if model.get("type") != "BPE":
        return [f"a {model.get('type')} tokenizer is not written: the file holds no vocabulary"]
    notes = []
    tokens, types = _tokens(gguf, described, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        notes.append("token scores follow the order of the vocabulary")
    else:
        pre = pre_tokenizer(described)
        if pre == "default":
            notes.append("the pre-tokenizer is not one we know: llama.cpp's default will be used")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=size)
    special.add_to_gguf(writer, quiet=True)
    return notes


def pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name of the splitting rule, recognised by its parts; ``default`` if unknown."""
    rule = described.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    patterns = "".join(str(step.get("pattern", "")) for step in steps)
    if "Digits" in kinds and "ByteLevel" in kinds:
        return "smollm"
    if "(?i:'s|'t" in patterns:
        return "llama-bpe" if r"\\p{N}{1,3}" in patterns or r"\p{N}{1,3}" in patterns else "qwen2"
    return "gpt-2" if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) else "default"


def _tokens(gguf: ModuleType, described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    kind = gguf.TokenType
    texts: dict[int, str] = {i: text for text, i in described["model"]["vocab"].items()}
    added = {item["id"]: item for item in described.get("added_tokens", ())}
    texts |= {i: item["content"] for i, item in added.items()}
    tokens, types = [], []
    for i in range(max(size, max(texts, default=-1) + 1)):
        text = texts.get(i)
        if text is None:
            tokens.append(f"[PAD{i}]")
            types.append(int(kind.UNUSED))
            continue
        tokens.append(text)
        if i in added:
            special = added[i].get("special")
            types.append(int(kind.CONTROL if special else kind.USER_DEFINED))
        elif described["model"].get("byte_fallback") and len(text) == 6 and text[:3] == "<0x":
            types.append(int(kind.BYTE))
        else:
            types.append(int(kind.NORMAL))
    return tokens, types
