"""Packed tokens: the stream is the documents' tokens, windows and boundaries are those of brute force, positions resume."""

from __future__ import annotations

import itertools
import json
import pickle
import random

import numpy as np
import pytest

from supremum.errors import SupremumError
from supremum.text import PackedTokens, pack
from supremum.text.packed import permuted

from ..conftest import tiny_tokenizer

WORDS = ["river", "stone", "moves", "the", "12", "é", "你好"]
TEXTS = [" ".join(random.Random(n).choices(WORDS, k=5 + n % 23)) for n in range(60)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pack(folder / "a.jsonl", tiny_tokenizer(), folder / "out", shard=1000, workers=1)
    return folder


def stream() -> tuple[list[int], list[int]]:
    """(tokens, document of each), by the tokenizer alone."""
    tokenizer = tiny_tokenizer()
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    return list(itertools.chain(*rows)), [n for n, row in enumerate(rows) for _ in row]


def test_the_stream_is_the_documents(packed):
    tokens, _ = stream()
    read = PackedTokens(packed / "out", 16)
    assert read.tokens == len(tokens) and read.documents == len(TEXTS)
    assert [shard["tokens"] for shard in read.index["shards"]][:-1] == [1000] * (len(tokens) // 1000)
    assert read.read(0, read.tokens).tolist() == tokens
    raw = np.fromfile(packed / "out" / "tokens-00001.bin", dtype="<u2")
    assert raw.tolist() == tokens[1000:2000]


def test_windows_and_boundaries(packed):
    tokens, documents = stream()
    read = PackedTokens(packed / "out", 64, boundaries=True)
    assert len(read) == (len(tokens) - 1) // 64
    for number in range(len(read)):
        window, document = read[number]
        place = slice(number * 64, number * 64 + 65)
        assert window.tolist() == tokens[place]
        assert document.tolist() == [d - documents[place.start] for d in documents[place]]
    with pytest.raises(IndexError):
        read[len(read)]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_the_order_is_a_permutation_that_the_seed_and_epoch_set(count):
    orders = [[permuted(n, count, key) for n in range(count)] for key in ("0/0", "0/1", "1/0")]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 16 or len({tuple(order) for order in orders}) == 3


def test_the_order_looks_random():
    order = np.array([permuted(n, 4096, "7/0") for n in range(4096)])
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 4 / 64  # four standard errors
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / 64
    assert abs(np.mean(order[1:] > order[:-1]) - 0.5) < 0.05


def test_a_position_resumes_and_ranks_share(packed):
    whole = PackedTokens(packed / "out", 32, seed=3)
    count = len(whole)
    expected = [window.tolist() for window in itertools.islice(whole, 2 * count)]
    assert sorted(map(tuple, expected[:count])) == sorted(tuple(whole[n].tolist()) for n in range(count))
    assert expected[:count] != expected[count:]
    first = PackedTokens(packed / "out", 32, seed=3)
    begun = [window.tolist() for window in itertools.islice(first, 11)]
    state = json.loads(json.dumps(first.state()))
    ranks = [PackedTokens(packed / "out", 32, seed=3, rank=rank, ranks=2) for rank in (0, 1)]
    for one in ranks:
        one.resume(state)
    rest = [window.tolist() for pair in zip(*(itertools.islice(one, 5) for one in ranks), strict=True) for window in pair]
    assert begun + rest == expected[:21]
    assert ranks[0].state()["consumed"] == 21
    again = PackedTokens(packed / "out", 32, seed=3)
    again.resume(ranks[1].state())
    assert next(iter(again)).tolist() == expected[21]
    with pytest.raises(SupremumError, match="seed changed"):
        PackedTokens(packed / "out", 32, seed=4).resume(state)
    with pytest.raises(SupremumError, match="length changed"):
        PackedTokens(packed / "out", 16, seed=3).resume(state)


def test_it_feeds_a_loader_of_processes(packed):
    from torch.utils.data import DataLoader

    read = PackedTokens(packed / "out", 32, boundaries=True)
    read[0]
    assert len(pickle.dumps(read)) < 10_000  # the maps stay behind
    batches = list(DataLoader(read, batch_size=4, num_workers=1))
    assert batches[0][0].shape == (4, 33) and batches[0][0][2].tolist() == read[2][0].tolist()


def test_workers_give_the_same_bytes_and_text_cannot_forge_a_boundary(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("supremum.text.parallel.ITEMS", 8)
    pack(packed / "a.jsonl", tiny_tokenizer(), tmp_path / "out", shard=1000, workers=2)
    for file in sorted(path for path in (tmp_path / "out").rglob("*.bin")):
        assert file.read_bytes() == (packed / "out" / file.name).read_bytes()
    tokenizer = tiny_tokenizer()
    (tmp_path / "b.txt").write_text(f"one {tokenizer.eos_token} two {tokenizer.eos_token}" * 5)
    pack(tmp_path / "b.txt", tokenizer, tmp_path / "forged", workers=1)
    read = PackedTokens(tmp_path / "forged", 8)
    tokens = read.read(0, read.tokens).tolist()
    assert tokens.count(tokenizer.eos_token_id) == 1 == tokens[::-1].index(tokenizer.eos_token_id) + 1
    assert tokenizer.decode(tokens[:-1]) == f"one {tokenizer.eos_token} two {tokenizer.eos_token}" * 5


def test_frames_and_wide_vocabularies(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(70_000)} | {"[CLS]": 70_000, "[SEP]": 70_001}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 70_000), ("[SEP]", 70_001)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", cls_token="[CLS]", sep_token="[SEP]")
    made.save_pretrained(tmp_path / "tok")
    (tmp_path / "a.txt").write_text("w69999 w5\nnew w7\n")
    done = pack(tmp_path / "a.txt", tmp_path / "tok", tmp_path / "out", workers=1, reading=None)
    read = PackedTokens(tmp_path / "out", 3)
    assert done.dtype == "<u4" and done.unknown == 1
    assert read.read(0, read.tokens).tolist() == [70_000, 69_999, 5, 0, 7, 70_001]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")) == 70_002


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_damage_is_refused(packed, tmp_path):
    import shutil

    with pytest.raises(SupremumError, match="no folder of packed tokens"):
        PackedTokens(tmp_path, 8)
    for number, (harm, message) in enumerate([
            (lambda f: (f / "tokens-00000.bin").write_bytes(b"ab"), "has 2 bytes where the index says 2000"),
            (lambda f: (f / "starts.bin").unlink(), "has None bytes"),
            (lambda f: (f / "index.json").write_text("{"), "is damaged"),
            (lambda f: change(f / "index.json", "tokens-00000", "../x"), "no index"),
            (lambda f: change(f / "index.json", "<u2", "|O"), "no index")]):
        folder = tmp_path / str(number)
        shutil.copytree(packed / "out", folder)
        harm(folder)
        with pytest.raises(SupremumError, match=message):
            PackedTokens(folder, 8)
    with pytest.raises(SupremumError, match="make no window"):
        PackedTokens(packed / "out", 10 ** 6)


def test_bad_records_are_counted_and_an_interruption_leaves_what_stood_there(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one \\ud83d half"}\nnot json\n{"text": "two"}\n')
    done = pack(tmp_path / "a.jsonl", tiny_tokenizer(), tmp_path / "out", workers=1)
    assert (done.documents, done.unreadable) == (2, 1) and "line 2" in done.faults[0]
    with pytest.raises(SupremumError, match="line 1: holds half"):
        pack(tmp_path / "a.jsonl", tiny_tokenizer(), tmp_path / "strict", workers=1, strict=True)
    with pytest.raises(SupremumError, match="exists"):
        pack(tmp_path / "a.jsonl", tiny_tokenizer(), tmp_path / "out", workers=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("supremum.text.packing.Shards.close", interrupt)
    before = (tmp_path / "out" / "index.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "a.jsonl", tiny_tokenizer(), tmp_path / "out", workers=1, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "a.jsonl", "out"]
    assert (tmp_path / "out" / "index.json").read_bytes() == before
