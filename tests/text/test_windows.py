"""Windows: exact counts, even spread, determinism, and held-out text that calibration never sees."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum.errors import SupremumError
from supremum.text import calibration_and_held_out, fingerprint, split, tokens_from_text
from supremum.text.windows import frame, shares_text, spread

from .words import stand_in, word_tokenizer


def write(path, numbers) -> str:
    path.write_text(" ".join(f"w{i}" for i in numbers))
    return str(path)


@given(total=st.integers(1, 500), data=st.data(), seed=st.integers(0, 10**9))
def test_spread_is_exact_increasing_and_even(total, data, seed):
    count = data.draw(st.integers(1, total))
    chosen = spread(total, count, seed)
    gaps = chosen.diff()
    assert len(chosen) == count and chosen[0] >= 0 and chosen[-1] < total
    assert count == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    assert torch.equal(chosen, spread(total, count, seed))


@given(total=st.integers(1, 500), count=st.integers(1, 100))
def test_seed_zero_takes_every_kth_window(total, count):
    if total >= 2 * count:
        assert spread(total, count).tolist() == list(range(total))[:: total // count][:count]


def test_windows_of_one_document_are_its_tokens_without_a_separator(checkpoint, tmp_path):
    windows = tokens_from_text(checkpoint, [write(tmp_path / "a.txt", range(100))], tokens=96, length=8)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, torch.arange(96).view(12, 8) + 5)


def test_documents_are_joined_by_the_end_token(checkpoint, tmp_path):
    sources = [write(tmp_path / "a.txt", [0, 1, 2]), write(tmp_path / "b.txt", [3, 4])]
    assert tokens_from_text(checkpoint, sources, tokens=6, length=6).tolist() == [[5, 6, 7, 2, 8, 9]]


@pytest.mark.parametrize("template, prefix, suffix", [(None, [], []), ("<s> $A", [1], []), ("<s> $A </s>", [1], [2])])
def test_every_window_carries_the_tokenizers_frame(tmp_path, template, prefix, suffix):
    tokenizer = word_tokenizer(template)
    assert frame(tokenizer) == (prefix, suffix)
    source = write(tmp_path / "a.txt", range(50))
    windows = tokens_from_text(stand_in(tokenizer), [source], tokens=30, length=10)
    body = windows[:, len(prefix):10 - len(suffix)]
    assert windows.shape == (3, 10)
    assert torch.equal(windows[:, :len(prefix)], torch.tensor(prefix).expand(3, -1).long())
    assert torch.equal(windows[:, 10 - len(suffix):], torch.tensor(suffix).expand(3, -1).long())
    stride = 2 if body.shape[1] < 9 else 1
    assert body[1, 0] - body[0, 0] == body.shape[1] * stride


@settings(max_examples=40, deadline=None)
@given(calibration=st.integers(1, 30), held_out=st.integers(1, 30), more=st.integers(0, 40),
       length=st.integers(2, 80), seed=st.integers(0, 1000))
def test_split_is_disjoint_exact_and_deterministic(calibration, held_out, more, length, seed):
    total = calibration + held_out + more
    windows = torch.arange(total * length).view(total, length)  # no token occurs twice
    one, other = split(windows, calibration=calibration, held_out=held_out, seed=seed)
    assert one.shape == (calibration, length) and other.shape == (held_out, length)
    assert not set(one.flatten().tolist()) & set(other.flatten().tolist())
    again = split(windows, calibration=calibration, held_out=held_out, seed=seed)
    assert fingerprint(again[0]) == fingerprint(one) and fingerprint(again[1]) == fingerprint(other)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), run=st.integers(1, 9), shift=st.integers(0, 5))
def test_shared_runs_are_those_of_brute_force(seed, run, shift):
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, 3, (6, 12), generator=generator)
    held_out = torch.randint(0, 3, (2, 12), generator=generator)
    held_out[0, shift:shift + 6] = windows[3, 2:8]
    known = {tuple(row[i:i + run].tolist()) for row in held_out for i in range(13 - run)}
    expected = [any(tuple(row[i:i + run].tolist()) in known for i in range(13 - run)) for row in windows]
    assert shares_text(windows, held_out, run).tolist() == expected


def test_a_document_that_occurs_twice_is_kept_out_of_calibration(checkpoint, tmp_path):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 997, (4000,), generator=generator).tolist()
    numbers += [3, *numbers[:2000]]  # the first half again, at another offset
    source = write(tmp_path / "a.txt", numbers)
    one, other = calibration_and_held_out(checkpoint, [source], tokens=1000, held_out_tokens=500, length=100)
    assert one.shape == (10, 100) and other.shape == (5, 100)
    assert not shares_text(one, other).any()


def test_text_that_repeats_itself_cannot_be_split(checkpoint, tmp_path):
    source = write(tmp_path / "a.txt", list(range(25)) * 80)
    with pytest.raises(SupremumError, match=r"Only 0 of \d+ windows share no text"):
        calibration_and_held_out(checkpoint, [source], tokens=400, held_out_tokens=100, length=50)


def test_too_little_text_is_refused_with_the_number_that_is_there(checkpoint, tmp_path):
    source = write(tmp_path / "a.txt", range(100))
    with pytest.raises(SupremumError, match=r"holds 100 tokens, 6 windows of 16; 8 are wanted.*fewer --tokens"):
        tokens_from_text(checkpoint, [source], tokens=128, length=16)
    with pytest.raises(SupremumError, match=r"6 windows of 16; 7 are wanted"):
        calibration_and_held_out(checkpoint, [source], tokens=80, held_out_tokens=32, length=16)


@pytest.mark.parametrize("tokens, length, message", [
    (8, 16, "less than one window"), (0, 16, "less than one window"), (16, 1, "nothing to predict"),
    (5000, 5000, "longer than the model's context of 4096")])
def test_impossible_budgets_are_refused(checkpoint, tmp_path, tokens, length, message):
    with pytest.raises(SupremumError, match=message):
        tokens_from_text(checkpoint, [write(tmp_path / "a.txt", range(100))], tokens=tokens, length=length)


def test_the_seed_shifts_the_choice_and_nothing_else_does(checkpoint, tmp_path):
    source = write(tmp_path / "a.txt", range(900))
    sets = [tokens_from_text(checkpoint, [source], tokens=80, length=8, seed=seed) for seed in (0, 0, 1, 2)]
    prints = [fingerprint(windows) for windows in sets]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_fingerprint_is_sha256_of_shape_and_little_endian_tokens():
    windows = torch.tensor([[1, 2], [3, 4]])
    data = b"(2, 2)" + b"".join(i.to_bytes(8, "little") for i in (1, 2, 3, 4))
    assert fingerprint(windows) == hashlib.sha256(data).hexdigest()
    assert fingerprint(windows.view(1, 4)) != fingerprint(windows)
