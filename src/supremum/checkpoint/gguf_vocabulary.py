"""A Transformers tokenizer as GGUF keys (`tokenizer.ggml.*`).

Two of llama.cpp's tokenizers cover the decoders that Supremum opens:

    "gpt2"    byte-level BPE: tokens, merges, and the name of a splitting rule that llama.cpp has compiled in
    "llama"   SentencePiece BPE with byte fallback: tokens with scores. tokenizer.json keeps merges instead of scores;
              the score of a token is minus the rank of its first merge, which orders merges as the original scores did

Token types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Ids that the embedding has and the
tokenizer lacks are filled with unused tokens; added tokens beyond the embedding cannot be embedded and are left out.
"""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType

from ..errors import CheckpointError
from .pretokenizers import name_of

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, vocab_size: int, source: str) -> None:
    """Write the tokenizer's keys. `vocab_size`: rows of the embedding. Raises CheckpointError for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{source}: the tokenizer has no tokenizer.json.",
                              "Save it with a fast tokenizer (AutoTokenizer.from_pretrained(...).save_pretrained).")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"{source}: a {model['type']} tokenizer has no counterpart in this target.",
                              "GGUF holds byte-level BPE and SentencePiece BPE; try --target compressed-tensors.")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens, types = _tokens(model, spec["added_tokens"], vocab_size, source)
    if _mentions(spec["pre_tokenizer"], "ByteLevel") or _mentions(spec["decoder"], "ByteLevel"):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name_of(spec, source))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    elif model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, types, merges))
        writer.add_token_types([TokenType.BYTE if BYTE.fullmatch(t) and k == TokenType.NORMAL else k
                                for t, k in zip(tokens, types, strict=True)])
        writer.add_add_space_prefix(_prefixes_space(spec))
    else:
        raise CheckpointError(f"{source}: a BPE tokenizer without bytes has no counterpart in GGUF.",
                              "Try --target compressed-tensors.")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for add, token in ((writer.add_bos_token_id, bos), (writer.add_eos_token_id, eos),
                       (writer.add_unk_token_id, tokenizer.unk_token_id),
                       (writer.add_pad_token_id, tokenizer.pad_token_id)):
        if token is not None and token < vocab_size:
            add(token)
    probe = tokenizer("a").input_ids
    writer.add_add_bos_token(bos is not None and probe[:1] == [bos])
    writer.add_add_eos_token(eos is not None and probe[-1:] == [eos])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)


def _tokens(model: dict[str, Any], added: list[dict[str, Any]], vocab_size: int,
            source: str) -> tuple[list[str], list[int]]:
    """Text and type of every id below `vocab_size`."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types: list[int] = [TokenType.UNUSED] * vocab_size
    for text, token in model["vocab"].items():
        if token >= vocab_size:
            raise CheckpointError(f"{source}: token {text!r} has id {token}, but the embedding has {vocab_size} rows.",
                                  "The tokenizer belongs to another model.")
        tokens[token], types[token] = text, TokenType.NORMAL
    for entry in added:
        token = entry["id"]
        if token < vocab_size:
            tokens[token] = entry["content"]
            types[token] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token") or "")
    if unknown is not None and model.get("byte_fallback"):
        types[unknown] = TokenType.UNKNOWN
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        rank.setdefault(left + right, place)
    last = len(merges)
    return [-float(rank.get(text, last)) if kind == TokenType.NORMAL else 0.0
            for text, kind in zip(tokens, types, strict=True)]


def _mentions(part: Any, kind: str) -> bool:
    """Whether a component of tokenizer.json is, or contains, one of this type."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(_mentions(value, kind) for value in part)


def _prefixes_space(spec: dict[str, Any]) -> bool:
    """Whether a space is put before the text (Llama 2, Mistral, Phi-3; not Gemma)."""
    if _mentions(spec["normalizer"], "Prepend"):
        return True
    pre = spec["pre_tokenizer"] or {}
    parts = pre.get("pretokenizers", [pre])
    return any(p.get("type") == "Metaspace" and p.get("prepend_scheme", "always") != "never" for p in parts)
