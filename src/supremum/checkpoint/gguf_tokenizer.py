"""A Transformers tokenizer from a GGUF file's `tokenizer.ggml.*` keys.

Byte-level BPE ("gpt2") is rebuilt here: vocabulary, merges, and the splitting rule that the file only names
(`pretokenizers`). SentencePiece ("llama") takes its merges, recovered from scores, from Transformers' own converter.
Token types: 3 control, 4 user-defined (taken whole), https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..errors import CheckpointError
from .architecture import short_reason
from .pretokenizers import RULES, rule

KEY = "tokenizer.ggml."
SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
           "pad_token": "padding_token_id"}  # fmt: skip


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer. Raises CheckpointError when the file has none, or one whose rule is not known."""
    kind, tokens = metadata.get(f"{KEY}model"), metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise CheckpointError(f"{path}: has no tokenizer.", "Give the model's Hugging Face folder.")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: its vocabulary holds a token twice.", "Convert the model again.")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise CheckpointError(f"{path}: a tokenizer of the kind {str(kind)[:40]!r} is not read from GGUF here.",
                              "Give the model's Hugging Face folder.")  # fmt: skip
    try:
        backend = builders[kind](path, metadata, tokens)
        backend.add_special_tokens(_added(metadata, tokens, 3))
        backend.add_tokens(_added(metadata, tokens, 4))
        return _wrapped(path, metadata, tokens, backend)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{path}: its tokenizer cannot be built ({short_reason(error)}).",
                              "Give the model's Hugging Face folder.") from error  # fmt: skip


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    chosen = rule(metadata.get(f"{KEY}pre") or "gpt-2", str(path))
    merges = [tuple(pair.split(" ")) for pair in metadata.get(f"{KEY}merges") or []]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if any(len(pair) != 2 for pair in merges):
        raise CheckpointError(f"{path}: a merge of its tokenizer is not a pair.", "Convert the model again.")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=chosen.ignore_merges))
    backend.pre_tokenizer = _pre_tokenizer(chosen.json)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(spec: dict[str, Any]) -> Any:
    """A pre-tokenizer object from tokenizer.json's description of it."""
    from tokenizers import Regex

    kind = spec["type"]
    if kind == "Sequence":
        return pre_tokenizers.Sequence([_pre_tokenizer(part) for part in spec["pretokenizers"]])
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=spec["individual_digits"])
    if kind == "Split":
        return pre_tokenizers.Split(Regex(spec["pattern"]["Regex"]), "isolated")
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=spec["use_regex"])


def _sentencepiece(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:  # Transformers before 5.20 kept it elsewhere
        from transformers.integrations.ggml import convert_gguf_tokenizer  # type: ignore[attr-defined,no-redef]

    names = {"model": "tokenizer_type", "tokens": "tokens", "scores": "scores", "token_type": "token_type",
             "merges": "merges", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
             "unknown_token_id": "unk_token_id", "padding_token_id": "pad_token_id",
             "add_space_prefix": "add_prefix_space"}  # fmt: skip
    described = {theirs: metadata[KEY + ours] for ours, theirs in names.items() if KEY + ours in metadata}
    backend, _ = convert_gguf_tokenizer(metadata["general.architecture"], described)
    # the converter places the leading space as newer Llama tokenizers do; llama.cpp puts one before every stretch of text
    prefix = bool(metadata.get(f"{KEY}add_space_prefix", True))
    spaces = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    backend.pre_tokenizer = None
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)] if prefix else text)
    return backend


def _added(metadata: Mapping[str, Any], tokens: list[str], kind: int) -> list[AddedToken]:
    types = metadata.get(f"{KEY}token_type") or []
    return [AddedToken(token, normalized=False, special=kind == 3)
            for token, found in zip(tokens, types, strict=False) if found == kind and token]  # fmt: skip


def _wrapped(path: Path, metadata: Mapping[str, Any], tokens: list[str], backend: Tokenizer) -> PreTrainedTokenizerFast:
    special: dict[str, str] = {}
    for name, key in SPECIAL.items():
        token = metadata.get(KEY + key)
        if token is None:
            continue
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise CheckpointError(f"{path}: {KEY}{key} is {token!r}; there are {len(tokens)} tokens.",
                                  "Convert the model again.")  # fmt: skip
        special[name] = tokens[token]
    sentencepiece = metadata.get(f"{KEY}model") == "llama"
    named = next((r for r in RULES if metadata.get(f"{KEY}pre") in r.names), RULES[0])
    begin = bool(metadata.get(f"{KEY}add_bos_token", sentencepiece or named.add_bos)) and "bos_token" in special
    end = bool(metadata.get(f"{KEY}add_eos_token", False)) and "eos_token" in special
    if begin or end:
        used = [special[name] for name, on in (("bos_token", begin), ("eos_token", end)) if on]
        single = " ".join(([used[0]] if begin else []) + ["$A"] + ([used[-1]] if end else []))
        backend.post_processor = processors.TemplateProcessing(
            single=_pieces(single), pair=_pieces(single) + _pieces(single.replace("$A", "$B"), 1),
            special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(used)])  # fmt: skip
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    template = metadata.get("tokenizer.chat_template")
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False, **special,
        **({"model_max_length": length} if isinstance(length, int) else {}))  # fmt: skip


def _pieces(template: str, segment: int = 0) -> list[str]:
    return [f"{piece}:{segment}" for piece in template.split(" ")]
