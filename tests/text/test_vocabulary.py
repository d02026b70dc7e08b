"""Trained tokenizers load in AutoTokenizer, keep their promises about bytes, and are measured as counting by hand does."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from supremum.errors import SupremumError
from supremum.text import tokenizer_report, train_tokenizer
from supremum.text.fertility import covered
from supremum.text.vocabulary import fit_wordpiece

ENGLISH = ["the", "river", "was", "high", "that", "spring", "and", "people", "of", "village", "had", "to", "carry", "goods",
           "over", "old", "bridge", "it", "is", "not"]
CHINESE = ["酒店", "服务", "很好", "房间", "干净", "下次", "还会", "再来", "早餐", "一般"]
STRANGE = "  héllo 😀 ไทย\n\t12 <0x41> <|endoftext|> 你好 don't"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    chosen = random.Random(0)
    rows = [" ".join(chosen.choices(ENGLISH, k=20)).capitalize() + "." for _ in range(150)]
    rows += ["".join(chosen.choices(CHINESE, k=15)) + "。" for _ in range(150)]
    chosen.shuffle(rows)
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind, bytes_as", [("bpe", "level"), ("bpe", "fallback"), ("unigram", "fallback"),
                                            ("unigram", "level"), ("bpe", "none"), ("unigram", "none"),
                                            ("wordpiece", "none")])
def test_every_kind_loads_and_says_what_it_loses(source, tmp_path, kind, bytes_as):
    size = 700
    report = train_tokenizer(source, tmp_path / "tok", kind=kind, bytes_as=bytes_as, vocabulary=size,
                             special=["<|im_start|>"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert len(tokenizer) == report.size <= size
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert tokenizer.tokenize("<|im_start|>the")[0] == "<|im_start|>"
    ids = tokenizer(STRANGE, add_special_tokens=False).input_ids
    if bytes_as == "none":
        assert tokenizer.unk_token_id in tokenizer("ไ", add_special_tokens=False).input_ids
    else:
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
        decoded = tokenizer.decode(ids)
        assert decoded == STRANGE if bytes_as == "level" else decoded.strip() == STRANGE.strip()
        assert vocabulary.get("<0x41>", -1) not in ids  # the text "<0x41>" is not the byte
    text = "the old bridge" if kind == "wordpiece" else "The old bridge."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert set(report.languages) == {"all", "en", "zh"}
    assert report.languages["all"].documents == 15  # every twentieth of 300
    for suits in report.languages.values():
        assert (suits.unknown == 0 and suits.exact == suits.documents) or kind == "wordpiece"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_same_text_makes_the_same_tokenizer(kind, tmp_path):
    """Of made-up words, with many equally frequent pairs of letters; the library's own WordPiece differs each time."""
    chosen = random.Random(1)
    words = ["".join(chosen.choices("abcdefghijklmnop", k=7)) for _ in range(400)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    for name in "xyz":
        train_tokenizer(tmp_path / "a.txt", tmp_path / name, kind=kind, vocabulary=700)
    one, *others = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "xyz")
    assert all(other == one for other in others)


def test_wordpiece_is_the_library_s_where_no_two_pairs_are_equally_frequent(tmp_path):
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    text = " ".join(word for place, word in enumerate(["ab", "cd", "ae", "fb", "xy", "ya"]) for _ in range(2**place))
    found, theirs = (Tokenizer(models.WordPiece(unk_token="[UNK]")) for _ in range(2))
    for one in (found, theirs):
        one.normalizer, one.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found = fit_wordpiece(found, lambda: [text], 17, ["[UNK]"])
    theirs.train_from_iterator([text], trainers.WordPieceTrainer(vocab_size=17, special_tokens=["[UNK]"]))
    assert set(found.get_vocab()) == set(theirs.get_vocab())
    assert [token.content for token in found.get_added_tokens_decoder().values()] == ["[UNK]"]
    assert [found.encode(word).tokens for word in ("ab", "ya", "fb")] == [["a", "##b"], ["ya"], ["fb"]]


def test_frames(source, tmp_path):
    train_tokenizer(source, tmp_path / "enc", kind="wordpiece", vocabulary=600, lowercase=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "enc")
    assert tokenizer.decode(tokenizer("The River", "was").input_ids) == "[CLS] the river [SEP] was [SEP]"
    assert tokenizer.mask_token == "[MASK]" and tokenizer.pad_token == "[PAD]"
    train_tokenizer(source, tmp_path / "dec", vocabulary=600)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dec")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")


def test_the_report_agrees_with_counting(tmp_path):
    from tokenizers import models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "river": 2, "is": 3, "not": 4, "很": 5, "好": 6}, "[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    report = tokenizer_report(made, ["the river is not the sea", "the river", "房很好好"])
    english, chinese = report.languages["en"], report.languages["zh"]
    assert (english.documents, english.words, english.tokens, english.characters) == (2, 8, 8, 33)
    assert english.unknown == len("sea") and english.spelled == 0
    assert (chinese.words, chinese.tokens, chinese.unknown, chinese.bytes) == (4, 4, 1, 12)
    assert chinese.ratios()["coverage"] == 0.75 and chinese.ratios()["tokens_per_character"] == 1
    assert report.languages["all"].words == 12
    assert covered(np.array([[0, 2], [1, 3], [3, 3]]), 4).tolist() == [1, 2, 1, 0]


def test_characters_spelled_in_bytes_are_counted(source, tmp_path):
    train_tokenizer(source, tmp_path / "tok", vocabulary=600)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    report = tokenizer_report(tokenizer, ["the 😀😀"])
    assert report.languages["all"].spelled == 2 and report.languages["all"].exact == 1


def test_what_cannot_be_is_refused(source, tmp_path):
    with pytest.raises(SupremumError, match="no tokens for bytes"):
        train_tokenizer(source, tmp_path / "a", kind="wordpiece", bytes_as="level")
    with pytest.raises(SupremumError, match="leaves no room"):
        train_tokenizer(source, tmp_path / "a", bytes_as="fallback", vocabulary=400)
    with pytest.raises(SupremumError, match="no such file"):
        train_tokenizer(tmp_path / "none.txt", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for fresh in (False, True):
        with pytest.raises(SupremumError, match="not of this kind"):
            train_tokenizer(source, tmp_path / "mine", fresh=fresh)


def test_the_same_text_gives_the_same_tokenizer(source, tmp_path):
    for name in ("a", "b"):
        train_tokenizer(source, tmp_path / name, vocabulary=600)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
