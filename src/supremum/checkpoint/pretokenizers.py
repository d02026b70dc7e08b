r"""The splitting rules that llama.cpp knows by name, and the same rules as `tokenizers` JSON.

A GGUF file does not hold the rule that cuts text into words before byte-level BPE merges; it holds a name
(`tokenizer.ggml.pre`), and llama.cpp has the rule in its source (src/llama-vocab.cpp). Reading needs name -> rule,
writing rule -> name; both are this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _split(*patterns: str) -> dict[str, Any]:
    cuts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return {"type": "Sequence", "pretokenizers": [*cuts, BYTES | {"use_regex": False}]}


@dataclass(frozen=True)
class Rule:
    """`names`: what llama.cpp calls it, the one to write first. `json`: tokenizer.json's `pre_tokenizer`.

    `ignore_merges`: a word that is a token is taken whole; `add_bos`: what llama.cpp does when the file does not say.
    """

    names: tuple[str, ...]
    json: dict[str, Any]
    ignore_merges: bool = False
    add_bos: bool = False


RULES = (
    Rule(("gpt-2", "default", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "modern-bert"), BYTES),
    Rule(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
         {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}),
    Rule(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
         _split(_WORDS + r"\p{N}{1,3}" + _TAIL), ignore_merges=True, add_bos=True),
    Rule(("smaug-bpe", "dbrx"), _split(_WORDS + r"\p{N}{1,3}" + _TAIL)),
    Rule(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo"), _split(_WORDS + r"\p{N}" + _TAIL)),
    Rule(("tekken",), _split(_CASED % ("", "") + r"\p{N}" + _CASED_TAIL), ignore_merges=True, add_bos=True),
    Rule(("gpt-4o", "llama4", "kanana2"), _split(_CASED % (_SUFFIX, _SUFFIX) + r"\p{N}{1,3}" + _CASED_TAIL)),
)  # fmt: skip


def rule(name: str, source: str) -> Rule:
    """The rule that llama.cpp calls `name`. Raises CheckpointError for a name that is not in the table."""
    for candidate in RULES:
        if name in candidate.names:
            return candidate
    raise CheckpointError(
        f"{source}: the splitting rule {name!r} of its tokenizer is not known here.",
        "Use the model's Hugging Face folder, whose tokenizer.json holds the rule itself.",
    )


def name_of(spec: dict[str, Any], source: str) -> str:
    """llama.cpp's name for the rule of a tokenizer. `spec`: the content of tokenizer.json.

    Raises CheckpointError when llama.cpp has no such rule: its tokens would silently be others.
    """
    normalizer = spec.get("normalizer")
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    rewriting = [part["type"] for part in parts if part["type"] != "NFC"]
    wanted = _plain(spec.get("pre_tokenizer"))
    found = [r for r in RULES if _plain(r.json) == wanted]
    if not found or rewriting:
        raise CheckpointError(
            f"{source}: llama.cpp has no name for this tokenizer's splitting rule.",
            "Use --target compressed-tensors, which keeps tokenizer.json.",
        )
    whole = bool(spec.get("model", {}).get("ignore_merges"))
    return min(found, key=lambda r: r.ignore_merges != whole).names[0]


def _plain(node: Any) -> Any:
    """A pre-tokenizer without what does not change tokens: offsets, defaults, nesting, equivalent spellings."""
    if node is None:
        return ()
    if node["type"] == "Sequence":
        return tuple(part for child in node["pretokenizers"] for part in _plain(child))
    if node["type"] == "ByteLevel":
        return (("ByteLevel", bool(node.get("add_prefix_space", True)), bool(node.get("use_regex", True))),)
    if node["type"] == "Digits":
        return (("Digits", bool(node.get("individual_digits", False))),)
    if node["type"] == "Split" and "Regex" in node["pattern"]:
        pattern = node["pattern"]["Regex"].replace(r"\p{N}{1}", r"\p{N}")
        contractions = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        pattern = pattern.replace(contractions, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)")
        behavior = "Isolated" if node["behavior"] in ("Isolated", "isolated") else node["behavior"]
        return (("Split", pattern, behavior, bool(node.get("invert", False))),)
    return ((node["type"], repr(sorted(node.items(), key=str))),)
