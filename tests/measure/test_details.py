"""Bits a byte, calibration, slices and changed tokens against plain arithmetic on stock logits; disturbed texts."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from supremum.checkpoint import open_checkpoint
from supremum.cli import app
from supremum.errors import SupremumError
from supremum.measure import evaluate_texts, render_text
from supremum.measure.cases import read_task
from supremum.measure.details import details, kind_of
from supremum.measure.intervals import ratio_interval
from supremum.measure.perturb import KINDS, perturb, perturbed_windows
from supremum.measure.scores import TokenScores, compare

from .test_evaluate import disturbed

TEXT = "The river carries the stone at 7 o'clock, and the bridge waits for teachers. "


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory):
    folder = tiny_model("llama")
    return disturbed(folder, tmp_path_factory.mktemp("pair") / "other", 0.3), folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{TEXT}{n} garden{'s' * (n % 3)}, " for n in range(60)))
    return tmp_path / "a.txt"


def test_tops_are_the_likeliest_tokens():
    logits, other = torch.randn(2, 9, 30, generator=torch.Generator().manual_seed(0))
    target = torch.arange(9)
    got = compare(other, logits, target, tops=True)
    assert got.top.equal(logits.argmax(-1)) and got.top_reference.equal(other.argmax(-1))
    torch.testing.assert_close(got.confidence, logits.softmax(-1).amax(-1))
    torch.testing.assert_close(got.confidence_reference, other.softmax(-1).amax(-1))
    alone = compare(None, logits, target, tops=True)
    assert alone.top.equal(got.top) and alone.top_reference is None and compare(None, logits, target).top is None
    torch.testing.assert_close(alone.nll, got.nll)


@torch.inference_mode()
def test_details_against_stock_logits(pair, text):
    (got,) = evaluate_texts(*pair, texts=[text], tokens=320, length=40)
    found, quality = got.details, got.quality
    stock, original = [AutoModelForCausalLM.from_pretrained(folder) for folder in pair]
    tokenizer = open_checkpoint(pair[1]).tokenizer()
    stream = torch.tensor(tokenizer(text.read_text()).input_ids)
    total = len(stream) // 40
    stride = total // 8
    windows = stream[:total * 40].view(total, 40)[torch.arange(8) * stride]
    logq, logp = [torch.log_softmax(model(windows).logits[:, :-1].double(), -1) for model in (stock, original)]
    target = windows[:, 1:]
    nll = -logq.gather(2, target[..., None])[..., 0]
    kl = (logp.exp() * (logp - logq)).sum(-1)
    size = sum(len(tokenizer.decode(row).encode()) for row in target)
    assert found.bytes == size
    assert found.bits_per_byte == pytest.approx((nll.sum() / math.log(2) / size).item(), rel=1e-5)
    # ECE bin by bin, as it is defined
    for logs, ece in ((logq, found.ece), (logp, found.ece_reference)):
        sure, top = logs.exp().max(-1)
        right, error = (top == target), 0.0
        for low in range(15):
            inside = (sure > low / 15) & (sure <= (low + 1) / 15)
            if inside.any():
                distance = right[inside].double().mean() - sure[inside].mean()
                error += inside.sum().item() / target.numel() * abs(distance.item())
        assert ece == pytest.approx(error, abs=1e-6)
    for rows in found.slices.values():
        assert sum(one.tokens for one in rows) == quality.tokens == 8 * 39
        assert sum(one.share * one.kl for one in rows) == pytest.approx(quality.kl_mean, rel=1e-5)
        assert sum(one.share * one.excess_nll for one in rows) == pytest.approx(quality.excess_nll, abs=1e-6)
        assert sum(one.share * one.same_top for one in rows) == pytest.approx(quality.same_top)
    first, rest = found.slices["place"]
    assert (first.name, rest.name) == ("place 1 to 31", "place 32 to 127")
    assert first.kl == pytest.approx(kl[:, :31].mean().item(), rel=1e-4)
    assert first.interval.low < first.kl < first.interval.high
    counts = np.unique(target.numpy(), return_counts=True)[1]
    classes = {"once": counts == 1, "2 to 9 times": (counts > 1) & (counts < 10), "10 to 99": counts >= 10}
    assert {one.name: one.tokens for one in found.slices["frequency"]} == {
        name: int(counts[inside].sum()) for name, inside in classes.items() if inside.any()}
    worst = found.most_changed[0]
    window, at = divmod(kl.argmax().item(), 39)
    assert worst.kl == pytest.approx(kl.max().item(), rel=1e-4) and worst.token == tokenizer.decode(target[window, at])
    assert worst.model == tokenizer.decode(logq[window, at].argmax())
    assert worst.nll == pytest.approx(nll[window, at].item(), 1e-4)
    assert worst.reference == tokenizer.decode(logp[window, at].argmax())
    assert [one.kl for one in found.most_changed] == sorted((one.kl for one in found.most_changed), reverse=True)


def test_bits_a_byte_of_a_coin(tiny_model):
    """A model that holds every token for equally likely pays log2 V a token, whatever its bytes."""
    tokenizer = open_checkpoint(tiny_model("llama")).tokenizer()
    target = torch.tensor([tokenizer("é river é").input_ids])
    size = target.shape[1:]
    score = TokenScores(torch.full(size, math.log(384)), top=target[0], confidence=torch.full(size, 1.0))
    found = details([score], target, tokenizer)
    assert found.bytes == len("é river é".encode()) == 11
    assert found.bits_per_byte == pytest.approx(target.shape[1] * math.log2(384) / 11)
    assert found.ece == 0 and found.bits_per_byte_reference is None and not found.most_changed
    assert found.slices["kind"][0].interval is None  # one window has no spread


@pytest.mark.parametrize("text, kind", [
    (" river", "Latin, word"), ("er", "Latin, in a word"), ("▁river", "Latin, word"), (" 12", "number"),
    ("…", "punctuation"), (",\n", "punctuation"), (" \n", "space"), ("北京", "Han"), ("ひ", "Hiragana"), (" мир", "Cyrillic"),
    ("\ufffd", "part of a character"), (" '12", "number"), ("(a", "Latin, in a word"),
])
def test_kinds_of_tokens(text, kind):
    assert kind_of(text) == kind
    assert kind_of(text, special=True) == "special"


def test_a_ratio_s_interval():
    random = np.random.default_rng(0)
    counts = random.integers(0, 20, 400)
    sums = np.array([random.exponential(2.0, n).sum() for n in counts])
    got = ratio_interval(sums, counts)
    assert got.value == pytest.approx(sums.sum() / counts.sum())
    assert got.high - got.low == pytest.approx(2 * 1.96 * 2 / math.sqrt(counts.sum()), rel=0.15)  # of a mean: sd / sqrt n


def edits(one, other):
    """Damerau's distance (adjacent swaps count 1), by the table."""
    table = {(i, j): i or j for i in range(len(one) + 1) for j in range(len(other) + 1) if not i or not j}
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (one[i - 1] != other[j - 1]))
            if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(one), len(other)]


def test_typos_are_single_slips_in_one_word_of_ten():
    words = ["stone", "bridge", "teacher", "Window", "o'clock", "and", "7", "Brücke", "mmmm"] * 200
    got = perturb(" ".join(words), "typos", 1).split(" ")
    assert len(got) == len(words) and got == perturb(" ".join(words), "typos", 1).split(" ")
    changed = [(a, b) for a, b in zip(words, got, strict=True) if a != b]
    long = sum(len(re.sub("[^a-zA-Zü]", "", word)) >= 4 for word in words)
    assert len(changed) == pytest.approx(0.1 * long, rel=0.25)
    assert all(edits(a, b) == 1 and a[0] == b[0] for a, b in changed)
    assert not any(a in ("and", "7") for a, _ in changed) and perturb("and 7 o'er", "typos") == "and 7 o'er"
    assert {len(b) - len(a) for a, b in changed} == {-1, 0, 1}
    assert perturb(" ".join(words), "typos", 2).split(" ") != got
    beginning = " ".join(words[:90])
    assert perturb(beginning + " stones", "typos", 3).startswith(perturb(beginning, "typos", 3))


def test_other_disturbances():
    assert perturb("The Stone", "lower") == "the stone" and perturb("The Stone", "upper") == "THE STONE"
    assert perturb("one two  three\nfour", "truncate") == "three\nfour"
    with pytest.raises(SupremumError, match=r"'noise' is no way.*typos, lower, upper, truncate"):
        perturb("a", "noise")
    assert set(KINDS) == {"typos", "lower", "upper", "truncate"}


def test_disturbed_windows_hold_the_disturbed_text(tiny_model):
    tokenizer = open_checkpoint(tiny_model("llama")).tokenizer()
    ids = torch.tensor(tokenizer(TEXT * 6).input_ids)
    windows = ids[:len(ids) // 3 * 3].view(3, -1)
    upper = perturbed_windows(tokenizer, windows, "upper")
    written = "".join(tokenizer.decode(row) for row in upper)
    assert upper.shape[1] == windows.shape[1] and (TEXT * 6).upper().startswith(written) and len(upper) > 3
    half = perturbed_windows(tokenizer, windows, "truncate")
    assert half.equal(windows[:, windows.shape[1] // 2:])
    assert perturbed_windows(tokenizer, windows, "typos", 1).equal(perturbed_windows(tokenizer, windows, "typos", 1))


def test_several_texts_and_disturbances_on_the_command_line(pair, text, tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": TEXT * 4}) + "\n" for _ in range(12)))
    words = ["evaluate", str(pair[0]), "--reference", str(pair[1]), "--text", str(text), "--text", str(tmp_path / "b.jsonl"),
             "--tokens", "160", "--length", "32", "--perturb", "typos", "--perturb", "truncate"]
    run = CliRunner().invoke(app, [*words, "--json"])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert "quality" not in document and [one["text"] for one in document["texts"]] == [str(text), str(tmp_path / "b.jsonl")]
    for one in document["texts"]:
        assert one["quality"]["windows"] == 5 and one["details"]["slices"]["kind"]
        assert one["perturbed"]["truncate"]["quality"]["tokens"] == 5 * 15
        assert one["perturbed"]["typos"]["quality"]["kl_mean"] > 0
    shown = CliRunner().invoke(app, [*words, "--details"])
    assert shown.exit_code == 0 and "b.jsonl: 155 tokens" in shown.stdout and "tokens that changed most" in shown.stdout
    console = Console(width=80, file=io.StringIO())
    for one in evaluate_texts(*pair, texts=[text], tokens=160, length=32, disturb=["upper"]):
        console.print(*render_text(one, slices=True))
    assert max(map(len, console.file.getvalue().splitlines())) <= 80 and "upper" in console.file.getvalue()
    run = CliRunner().invoke(app, [*words, "--tasks", str(tmp_path / "none.jsonl")])
    assert run.exit_code == 1 and "none.jsonl: cannot be read" in run.output


def test_tasks_are_disturbed_in_their_prompts_alone(tmp_path):
    rows = [{"query": "The River carries", "choices": ["A stone", "B"], "gold": 0},
            {"context_options": ["The River teacher opens", "The River engine opens"], "continuation": "Windows", "gold": 0}]
    for row in rows:
        (tmp_path / "t.jsonl").write_text(json.dumps(row))
        plain, upper = read_task(tmp_path / "t.jsonl"), read_task(tmp_path / "t.jsonl", change="upper")
        assert upper.name == "t, upper" and upper.cases[0].answers == plain.cases[0].answers
        assert upper.cases[0].prompts == tuple(prompt.upper() for prompt in plain.cases[0].prompts)
