"""Tokenizers trained on text: BPE (Sennrich et al. 2016), WordPiece (Schuster, Nakajima 2012), Unigram (Kudo 2018), by the
`tokenizers` library; the output is a folder that AutoTokenizer loads.

    bytes "level"     text is UTF-8 bytes from the start (Radford et al. 2019): nothing is unknown, decoding is exact
    bytes "fallback"  characters, and 256 tokens <0x00> to <0xFF> for those that the vocabulary lacks (SentencePiece's way)
    bytes "none"      characters that the vocabulary lacks are unknown; WordPiece has only this

The same text makes the same BPE and WordPiece in every run. Of Unigram the library adds up probabilities in another order
each time, so that scores differ by some thousandths. Every HELD_OUT-th piece of the text is kept from training; the report
is measured on it. Memory grows with the number of different words (clauses, in scripts without spaces), so `most` bounds the
text that is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SupremumError
from ..progress import note, phase
from ..workspace import replacing_folder, write_atomic
from .fertility import REPORT, Fertility, tokenizer_report
from .reading import Reading
from .sources import names_of, watched

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS, BYTES = ("bpe", "wordpiece", "unigram"), ("level", "fallback", "none")
HELD_OUT, PIECE = 20, 1 << 14  # every such piece, of so many characters at most, is measured instead of trained on
MEASURED = 2_000_000  # characters that are kept for the report
MOST = 10**9
ENCODER = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
DECODER = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]


def train_tokenizer(sources: Sequence[str | Path], out: str | Path, *, kind: str = "bpe", vocabulary: int = 32_000,
                    bytes_as: str | None = None, lowercase: bool = False, special: Sequence[str] = (), most: int = MOST,
                    reading: Reading | None = None, fresh: bool = False) -> Fertility:
    """Train on the first `most` characters of the sources and write the folder `out`; returns its report.

    bytes_as: see above; "level" for BPE, "fallback" for Unigram, "none" for WordPiece unless given. special: further tokens
    that are never split. Raises SupremumError for what the user can mend.
    """
    from transformers import PreTrainedTokenizerFast

    bytes_as = bytes_as or {"bpe": "level", "unigram": "fallback"}.get(kind, "none")
    folder = Path(out).expanduser()
    check_folder(folder, REPORT, fresh)
    names = ENCODER if kind == "wordpiece" else DECODER | ({} if bytes_as == "level" else {"unk_token": "<unk>"})
    tokens = list(dict.fromkeys([*names.values(), *special]))
    tokenizer = blank(kind, bytes_as, names.get("unk_token"), lowercase)
    held_out: list[str] = []
    reading = reading or Reading()

    def texts() -> Iterator[str]:
        held_out.clear()
        reading.read = 0
        return _training(watched(sources, reading, "read"), most, held_out)

    tokenizer = fit(tokenizer, texts, kind, bytes_as, vocabulary, tokens, names.get("unk_token"))
    if bytes_as == "fallback":
        tokenizer = with_byte_tokens(tokenizer, kind)
    if kind == "wordpiece":
        from tokenizers import processors

        ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names,
                                   additional_special_tokens=list(special))
    with phase("measure"):
        report = tokenizer_report(made, held_out)
    report.settings = {"kind": kind, "bytes": bytes_as, "vocabulary": vocabulary, "lowercase": lowercase,
                       "special": list(special), "most": most, "sources": names_of(sources)}
    with replacing_folder(folder) as staging:
        made.save_pretrained(staging)
        report.out = str(folder)
        write_atomic(staging / REPORT, report.to_json().encode())
    return report


def check_folder(folder: Path, mark: str, fresh: bool) -> None:
    """Refuse a folder that holds something else than what has the file `mark`, and that too unless `fresh`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / mark).is_file():
        raise SupremumError(f"{folder}: exists and is not of this kind (it has no {mark}).", "Choose another --out.")
    if not fresh:
        raise SupremumError(f"{folder}: exists.", "--fresh replaces it; or choose another --out.")


def blank(kind: str, bytes_as: str, unknown: str | None, lowercase: bool) -> Tokenizer:
    """An untrained tokenizer: how it normalises, cuts and decodes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if kind not in KINDS or bytes_as not in BYTES:
        raise SupremumError(f"{kind!r} with bytes {bytes_as!r} is no kind of tokenizer.",
                            f"Choose from {', '.join(KINDS)} and {', '.join(BYTES)}.")
    if kind == "wordpiece":
        if bytes_as != "none":
            raise SupremumError("WordPiece has no tokens for bytes; it marks what it lacks as [UNK].",
                                "Use --bytes none, or --kind bpe or unigram.")
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=bytes_as == "fallback", fuse_unk=False)
                          if kind == "bpe" else models.Unigram())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    digits = pre_tokenizers.Digits(individual_digits=True)
    if bytes_as == "level":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first"), digits,
            pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def fit(tokenizer: Tokenizer, texts: Callable[[], Iterator[str]], kind: str, bytes_as: str, vocabulary: int,
        special: list[str], unknown: str | None) -> Tokenizer:
    """The blank tokenizer trained. texts: each call reads them from the beginning."""
    from tokenizers import pre_tokenizers, trainers

    reserved = len(BYTE_TOKENS) if bytes_as == "fallback" else 0
    if vocabulary < 256 + reserved + len(special):
        raise SupremumError(f"A vocabulary of {vocabulary} leaves no room beside {len(special)} special tokens, 256 "
                            f"characters and {reserved} byte tokens.",
                            f"Use --vocabulary {256 + reserved + len(special)} or more.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if bytes_as == "level" else [chr(c) for c in range(33, 127)]
    settings: dict[str, Any] = {"vocab_size": vocabulary - reserved, "special_tokens": special, "show_progress": False,
                                "initial_alphabet": alphabet}
    most = max(256, vocabulary // 2)  # characters that are told apart
    if kind == "wordpiece":
        return fit_wordpiece(tokenizer, texts, vocabulary, special, alphabet, most)
    trainer: Any = trainers.UnigramTrainer(**settings, unk_token=unknown) if kind == "unigram" else \
        trainers.BpeTrainer(**settings, limit_alphabet=most)
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def fit_wordpiece(tokenizer: Tokenizer, texts: Callable[[], Iterable[str]], vocabulary: int, special: Sequence[str],
                  alphabet: Iterable[str] = (), most: int = 1 << 30) -> Tokenizer:
    """A blank WordPiece tokenizer trained, the same in every run. texts: each call reads them from the beginning; there are
    two. alphabet: characters that it has whatever the text; most: characters in all, the commonest.

    The library numbers characters inside words (##x) as it meets them in a hash table, another order each time, and which of
    two equally frequent pairs is merged hangs on their numbers. So they are numbered here, as special tokens while it
    trains."""
    from tokenizers import Tokenizer, trainers

    words = Counter[str]()
    for text in texts():
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)))
    counts = Counter(dict.fromkeys(alphabet, 1 << 60))
    for word, often in words.items():
        for c in word:
            counts[c] += often
    known = sorted(counts, key=lambda c: (-counts[c], c))[:most]
    within = {c for word in words for c in word[1:]}
    inside = [f"##{c}" for c in known if c in within]
    tokenizer.train_from_iterator(texts(), trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*special, *inside], initial_alphabet=known, limit_alphabet=len(known),
        show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(state))


def with_byte_tokens(tokenizer: Tokenizer, kind: str) -> Tokenizer:
    """The same with 256 byte tokens at the vocabulary's end. A Unigram's get a score so low that the text "<0x41>" is never
    taken for one."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    model = state["model"]
    if kind == "unigram":
        worst = min(score for _, score in model["vocab"])
        model["vocab"] += [[token, 10 * worst] for token in BYTE_TOKENS]
        model["byte_fallback"] = True
    else:
        size = len(model["vocab"])
        model["vocab"] |= {token: size + number for number, token in enumerate(BYTE_TOKENS)}
    return Tokenizer.from_str(json.dumps(state))


def _training(documents: Generator[tuple[str, str], None, None], most: int, held_out: list[str]) -> Iterator[str]:
    """The pieces to train on; every HELD_OUT-th goes to `held_out`. With too few, those trained on are measured."""
    number = read = kept = 0
    first = ""
    for _, document in documents:
        for piece in pieces(document):
            number, read = number + 1, read + len(piece)
            first = first or piece
            if number % HELD_OUT == 0 and kept < MEASURED:
                held_out.append(piece)
                kept += len(piece)
            else:
                yield piece
        if read >= most:
            break
    documents.close()  # ends its phase
    note(f"{read:,} characters to train on ...")
    if not held_out:
        held_out.append(first)


def pieces(text: str) -> Iterator[str]:
    """The text cut at line ends into pieces of about PIECE characters."""
    if len(text) <= PIECE:
        yield text
        return
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), PIECE):
            held.append(line[start:start + PIECE])
            size += len(held[-1])
            if size >= PIECE:
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)
