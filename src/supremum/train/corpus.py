"""From text to examples: a tokenizer (a folder, a hub id, or made here), and chunks that know where documents end.

Documents lie one after another, each closed by the end token, in one array of 32-bit tokens. Joined (the default), a chunk
of `length` runs over ends, which the model sees as tokens; separate, a chunk holds one document's tokens alone. Text that
`supremum text pack` wrote is read where it lies, window by window out of the mapped shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..errors import SupremumError
from ..text import load_text
from ..text.packed import PackedTokens, permuted
from ..text.vocabulary import fit_wordpiece
from .recipe import limits

END = "<|end|>"
_ENCODER = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
SENTINELS = 100
MADE = ("characters", "bpe", "wordpiece")


@dataclass(frozen=True)
class TokenizerRecipe:
    """`tokenizer: NAME` is a folder or hub id, or one of characters, bpe, wordpiece: made of the training text."""

    name: str = "bpe"
    vocabulary: int = limits(8192, least=260)
    lowercase: bool = False


class Chunks(Sequence[dict[str, Any]]):
    """Examples {"ids", "words"}: pieces of one array, framed by the tokenizer's tokens."""

    def __init__(self, tokens_N: np.ndarray, starts_N: np.ndarray, bounds_C2: np.ndarray,
                 frame: tuple[list[int], list[int]] = ([], [])) -> None:
        self.tokens_N, self.starts_N, self.bounds_C2, self.frame = tokens_N, starts_N, bounds_C2, frame

    def __len__(self) -> int:
        return len(self.bounds_C2)

    def __getitem__(self, index: Any) -> Any:
        begin, end = self.bounds_C2[index]
        before, after = self.frame
        return {"ids": np.concatenate([before, self.tokens_N[begin:end], after]).astype(np.int64),
                "words": np.concatenate([np.ones(len(before), bool), self.starts_N[begin:end], np.ones(len(after), bool)])}

    @property
    def total(self) -> int:
        """Tokens of the stream that the chunks are cut from."""
        return len(self.tokens_N)

    def bounds(self, index: int) -> tuple[int, int]:
        """Where a chunk lies in the stream, its frame left out."""
        return int(self.bounds_C2[index, 0]), int(self.bounds_C2[index, 1])

    def read(self, begin: int, end: int) -> np.ndarray:
        """(end - begin,) tokens of the stream."""
        return self.tokens_N[begin:end]

    def split(self, share: float) -> tuple[Chunks, Chunks]:
        """(the first, the last `share`): what is held out is a stretch of its own, never between trained chunks."""
        cut = len(self) - (max(1, round(share * len(self))) if share and len(self) > 1 else 0)
        return (Chunks(self.tokens_N, self.starts_N, self.bounds_C2[:cut], self.frame),
                Chunks(self.tokens_N, self.starts_N, self.bounds_C2[cut:], self.frame))


class PackedChunks(Sequence[dict[str, Any]]):
    """Windows of a packed folder as examples; every token counts as a word. Memory does not grow with the text."""

    def __init__(self, packed: PackedTokens, first: int, last: int, frame: tuple[list[int], list[int]] = ([], [])) -> None:
        self.packed, self.first, self.last, self.frame = packed, first, last, frame

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        before, after = self.frame
        ids = np.concatenate([before, self.read(*self.bounds(index)), after]).astype(np.int64)
        return {"ids": ids, "words": np.ones(len(ids), bool)}

    @property
    def total(self) -> int:
        """As of `Chunks`."""
        return self.packed.tokens

    def bounds(self, index: int) -> tuple[int, int]:
        """As of `Chunks`."""
        begin = (self.first + int(index)) * self.packed.length
        return begin, begin + self.packed.length

    def read(self, begin: int, end: int) -> np.ndarray:
        """As of `Chunks`."""
        return self.packed.read(begin, end)

    def order(self, draw: int, seed: int) -> int:
        """The example of draw number `draw`: a keyed permutation an epoch (text/packed.py), which takes no memory."""
        epoch, number = divmod(draw, len(self))
        return permuted(number, len(self), f"{seed}/{epoch}")

    def split(self, share: float) -> tuple[PackedChunks, PackedChunks]:
        """(the first, the last `share`), as of `Chunks`."""
        cut = self.last - (max(1, round(share * len(self))) if share and len(self) > 1 else 0)
        return (PackedChunks(self.packed, self.first, cut, self.frame), PackedChunks(self.packed, cut, self.last, self.frame))


def packed_chunks(folder: Path, tokenizer: Any, length: int, objective: str) -> PackedChunks:
    """The windows of a packed folder, each of `length` tokens with the frame of an encoder included."""
    framed, room = _room(tokenizer, length, objective)
    packed = PackedTokens(folder, room)
    if packed.vocabulary > len(tokenizer):
        raise SupremumError(f"{folder}: its tokens go up to {packed.vocabulary}, its tokenizer to {len(tokenizer)}.",
                            "Pack the text again.")
    return PackedChunks(packed, 0, packed.tokens // room, framed)


def _room(tokenizer: Any, length: int, objective: str) -> tuple[tuple[list[int], list[int]], int]:
    """(the frame around a chunk, the tokens of text in it)."""
    from ..text.windows import frame

    framed = frame(tokenizer) if objective in ("masked", "replaced") else ([], [])
    room = length - len(framed[0]) - len(framed[1]) - (1 if objective == "span" else 0)
    if room < 2:
        raise SupremumError(f"length: {length} leaves nothing to learn from.", "Use a length of 8 or more.")
    return framed, room


def make_tokenizer(recipe: TokenizerRecipe, sources: Sequence[Path], objective: str, length: int) -> Any:
    """Loaded, or trained on the text."""
    if recipe.name in MADE:
        return trained(recipe, lambda: _pieces(sources), objective, length, SENTINELS if objective == "span" else 0)
    return loaded(recipe)


def loaded(recipe: TokenizerRecipe) -> Any:
    """The tokenizer of a folder or hub id."""
    if recipe.name in ("character", "char", "unigram", "word-piece"):
        raise SupremumError(f"tokenizer: {recipe.name} is not made here.", "Use characters, bpe or wordpiece.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.name, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise SupremumError(f"tokenizer: {recipe.name} is no tokenizer that can be loaded ({reason}).",
                            "Name a folder, a hub id, characters, bpe or wordpiece.") from error
    if not tokenizer.is_fast:
        raise SupremumError(f"tokenizer: {recipe.name} has no tokenizer.json.", "Use a tokenizer with a fast version.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trained(recipe: TokenizerRecipe, text: Callable[[], Iterable[str]], objective: str, length: int, marks: int = 0) -> Any:
    """A tokenizer made of the text, with `marks` sentinels; for an encoder-decoder ("span") it ends a text with </s>. text:
    each call reads it from the beginning."""
    special = _ENCODER if objective in ("masked", "replaced") else _T5 if objective == "span" \
        else {"eos_token": END, "bos_token": END, "pad_token": END}
    names = [*dict.fromkeys(special.values()), *(f"<extra_id_{i}>" for i in range(marks))]
    unknown = special.get("unk_token")
    if recipe.name == "characters":
        known = sorted({character for piece in text() for character in piece})
        inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*names, *known])}, unk_token=unknown or END))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
    elif recipe.name == "wordpiece":
        inner = Tokenizer(models.WordPiece(unk_token=unknown or END))
        inner.normalizer = normalizers.BertNormalizer(lowercase=recipe.lowercase)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        inner = fit_wordpiece(inner, text, recipe.vocabulary, names)
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(text(), trainers.BpeTrainer(
            vocab_size=recipe.vocabulary, special_tokens=names, show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    if "cls_token" in special:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")])
    elif objective == "span":
        end = special["eos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, inner.token_to_id(end))])
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, clean_up_tokenization_spaces=False,
                                   **special)


def _pieces(sources: Sequence[Path], size: int = 100_000) -> Iterator[str]:
    """The text in pieces that a trainer takes one at a time, cut at spaces where there are any."""
    for document in load_text(sources):
        at = 0
        while at < len(document):
            end = at + size
            if end < len(document) and (space := document.rfind(" ", at, end)) > at:
                end = space
            yield document[at:end]
            at = end


def chunks(tokenizer: Any, sources: Sequence[Path], length: int, documents: Literal["joined", "separate"],
           objective: str) -> Chunks:
    """All of the text as examples of at most `length` tokens, the frame of an encoder included."""
    framed, room = _room(tokenizer, length, objective)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    tokens: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    bounds: list[tuple[int, int]] = []
    at = 0
    for document in load_text(sources):
        coded = tokenizer(document, add_special_tokens=False, verbose=False)
        words = np.array([-1 if w is None else w for w in coded.word_ids()], dtype=np.int64)
        ids = np.array(coded.input_ids, dtype=np.int32)
        starts.append(np.concatenate([np.diff(words, prepend=-2) != 0, [True]]) if end is not None
                      else np.diff(words, prepend=-2) != 0)
        tokens.append(np.append(ids, np.int32(end)) if end is not None else ids)
        if documents == "separate":
            bounds += [(b, min(b + room, at + len(ids))) for b in range(at, at + len(ids), room)
                       if min(b + room, at + len(ids)) - b >= 2]
        at += len(tokens[-1])
    if documents == "joined":
        bounds = [(b, b + room) for b in range(0, at - room + 1, room)]
    if not bounds:
        raise SupremumError(f"The text holds {at} tokens, less than one chunk of {length}.",
                            "Give more text, or a shorter length.")
    return Chunks(np.concatenate(tokens), np.concatenate(starts), np.array(bounds), framed)
