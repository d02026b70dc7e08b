"""Zero-shot tasks: log-likelihoods against stock forward passes, scores by hand, and every refusal."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from typer.testing import CliRunner

from supremum.checkpoint import open_checkpoint
from supremum.cli import app
from supremum.errors import SupremumError
from supremum.measure import evaluate_tasks, render_tasks, zeroshot
from supremum.measure.cases import Case, Task, read_task, tasks_from
from supremum.measure.trees import Text, TreeScorer, encode, shorten
from supremum.measure.zeroshot import Scores, compare_tasks, score_tasks, summarise_task

from .test_evaluate import disturbed

CHOICE = {"query": "The river carries the", "choices": ["stone", "bridge of stones", "winter"], "gold": 1}
CONTEXT = {"context_options": ["The teacher opens the", "The engine opens the"], "continuation": "window at 7", "gold": 0}
CLOZE = {"context": "The garden waits for", "continuation": "teachers"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.inference_mode()
def by_the_book(model, text):
    """One text at a time, whole softmax in double precision, the answer's tokens picked one by one."""
    logp = torch.log_softmax(model(torch.tensor([text.ids])).logits[0].double(), -1)
    places = range(text.start, len(text.ids))
    return (sum(logp[t - 1, text.ids[t]].item() for t in places),
            all(logp[t - 1].argmax().item() == text.ids[t] for t in places))


def random_cases(count=7):
    """Cases of one to four texts that share between none and all of their prompts."""
    random = np.random.default_rng(5)
    cases = []
    for number in range(count):
        trunk = random.integers(2, 384, size=1 + 3 * number).tolist()
        cases.append([Text([*trunk, *random.integers(2, 384, size=n + 2).tolist()], len(trunk) + n % 2)
                      for n in range(1 + number % 4)])
    cases[-1][1] = Text(cases[-1][0].ids[:-2], cases[-1][0].start)  # one that ends where another goes on
    return cases


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "phi3"])
def test_trees_give_what_single_texts_give(family, tiny_model):
    folder = tiny_model(family)
    model, cases = AutoModelForCausalLM.from_pretrained(folder), random_cases()
    for text in (greedy := [Text(random_cases()[2][0].ids[:4], 4)]):  # an answer that is the first choice
        with torch.inference_mode():
            ids = model.generate(torch.tensor([text.ids]), do_sample=False, max_new_tokens=2, min_new_tokens=2)
        cases.append([Text(ids[0].tolist(), 4)])
    assert greedy
    scorer = TreeScorer(open_checkpoint(folder).model(torch.float32), 256)
    assert scorer.trees
    found = dict(scorer.score(cases))
    assert sorted(found) == list(range(len(cases)))
    for index, case in enumerate(cases):
        for got, text in zip(found[index], case, strict=True):
            ll, first = by_the_book(model, text)
            assert got == (pytest.approx(ll, rel=1e-4), first)
    assert found[len(cases) - 1][0][1] is True
    plain = dict(TreeScorer.score(scorer_without_trees(scorer), cases))
    assert all(a[0] == pytest.approx(b[0], rel=1e-4) for i in plain for a, b in zip(plain[i], found[i], strict=True))


def scorer_without_trees(scorer):
    scorer.trees = False
    return scorer


def test_a_model_that_takes_no_trees_reads_one_text_at_a_time():
    """BLOOM's position bias counts the mask's columns: it cannot read a tree."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=384, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2)).eval()
    scorer = TreeScorer(model, None)
    assert not scorer.trees
    cases = random_cases()
    found = dict(scorer.score(cases))
    for index, case in enumerate(cases):
        assert [ll for ll, _ in found[index]] == pytest.approx([by_the_book(model, text)[0] for text in case], rel=1e-4)


def test_texts_longer_than_a_sliding_window_are_read_singly(tiny_model):
    folder = tiny_model("mistral", sliding_window=8)
    scorer = TreeScorer(open_checkpoint(folder).model(torch.float32), 256)
    cases, model = random_cases(), AutoModelForCausalLM.from_pretrained(folder)
    found = dict(scorer.score(cases))
    for index, case in enumerate(cases):
        assert [ll for ll, _ in found[index]] == pytest.approx([by_the_book(model, text)[0] for text in case], rel=1e-4)


def test_an_answer_s_tokens_are_those_behind_its_prompt(tiny_model):
    tokenizer = open_checkpoint(tiny_model("llama")).tokenizer()
    one, other = encode(tokenizer, Case(("The river",) * 2, ("moves the stone.", "waits")), [], [0])
    assert tokenizer.decode(one.ids) == "The river moves the stone." and tokenizer.decode(other.ids[other.start:]) == " waits"
    assert one.start == other.start == len(tokenizer("The river").input_ids)
    first, second = encode(tokenizer, Case(("The river", "A much longer stone"), ("waits",) * 2), [], [0])
    assert tokenizer.decode(second.ids[second.start:]) == tokenizer.decode(first.ids[first.start:]) == " waits"
    assert encode(tokenizer, Case(("The river",), ("waits",)), [9], [9])[0].ids == [9, *first.ids]
    assert shorten(Text(list(range(10)), 7), 6) == Text([4, 5, 6, 7, 8, 9], 3)
    assert shorten(Text(list(range(10)), 7), 2) == Text([8, 9], 1) and shorten(one, 256) is one


class Told:
    """A scorer that says what it was told."""

    def __init__(self, answers):
        self.answers = answers

    def score(self, cases):
        return [(i, [(ll, False) for ll in self.answers[i]]) for i in reversed(range(len(cases)))]


def test_accuracies_and_margins_by_hand(tiny_model):
    tokenizer = open_checkpoint(tiny_model("llama")).tokenizer()
    task = Task("t", "choice", (Case(("The",) * 3, ("stone", "bridges and", "ü"), 1), Case(("The",) * 2, ("a", "b"), 0)), 2)
    got = zeroshot._score_task(Told([[-4.0, -6.6, -1.5], [-2.0, -3.0]]), tokenizer, task, None, "t")
    assert got.right.tolist() == [False, True]
    # by bytes: -4/5, -6.6/11, -1.5/2 (an umlaut is two bytes)
    assert got.right_norm.tolist() == [True, True]
    assert got.margin.tolist() == pytest.approx([-6.6 + 1.5, 1.0])
    assert math.isnan(got.ll[1, 2])
    quality = summarise_task(task, got)
    assert quality.acc.value == 0.5 and quality.acc_norm.value == 1 and quality.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert quality.flips is None and quality.target_perplexity is None


def scores(right, margin):
    right, margin = np.array(right, dtype=bool), np.array(margin, dtype=float)
    return Scores(margin[:, None], right, ~right, margin, np.ones(len(right)), 0)


def test_flips_and_the_margin_s_change_by_hand():
    task = Task("t", "choice", tuple(Case(("q",) * 2, ("a", "b")) for _ in range(8)), 8)
    before = scores([1, 1, 1, 1, 1, 1, 0, 0], [1.0] * 8)
    after = scores([0, 0, 0, 0, 0, 1, 1, 0], [0.5] * 4 + [1.0] * 4)
    got = summarise_task(task, after, before)
    assert got.flips == {"gained": 1, "lost": 5, "p": pytest.approx(2 * (1 + 6) / 2**6)}
    assert got.acc_change.value == pytest.approx(-4 / 8) and got.acc_reference.value == 6 / 8
    assert got.flips_norm["gained"] == 5 and got.margin_change.value == pytest.approx(-0.25)
    cloze = summarise_task(Task("c", "cloze", task.cases, 8), after, before)
    assert cloze.target_perplexity == pytest.approx(math.exp(-0.75)) and cloze.acc_norm is None and cloze.chance == 0


def test_gaps_between_groups():
    def task(name, answers):
        return Task(name, "choice", tuple(Case(("q",) * 2, pair) for pair in answers), len(answers))

    pairs = [("nurse", "guest"), ("clerk", "child"), ("cook", "host"), ("guard", "owner")]
    tasks = [task("w_male", pairs), task("w_female", [pair[::-1] for pair in pairs]), task("other", pairs)]
    found = [scores([1, 1, 1, 0], [0] * 4), scores([1, 0, 0, 0], [0] * 4), scores([1] * 4, [0] * 4)]
    report = compare_tasks(tasks, found, found)
    (gap,) = report.gaps
    assert (gap.name, gap.groups, gap.paired) == ("w", ("female", "male"), True)
    assert gap.acc.value == pytest.approx(0.5) and gap.acc_reference == gap.acc
    assert [task.flips["p"] for task in report.tasks] == [1, 1, 1]
    unlike = [tasks[0], task("w_female", [("x", "y")] * 4)]
    assert compare_tasks(unlike, found[:2]).gaps[0].paired is False


def test_files_and_their_prompts(tmp_path):
    assert read_task(write(tmp_path / "arc_easy.jsonl", CHOICE)).cases[0].prompts[0] == "The river carries the\nAnswer:"
    assert read_task(write(tmp_path / "copa.jsonl", CHOICE)).cases[0] == Case(
        ("The river carries the",) * 3, tuple(CHOICE["choices"]), 1)
    assert read_task(write(tmp_path / "w.jsonl", CONTEXT)).cases[0] == Case(
        tuple(CONTEXT["context_options"]), ("window at 7",) * 2, 0)
    assert read_task(write(tmp_path / "l.jsonl", CLOZE)).kind == "cloze"
    braces = {"query": "{x} {}", "choices": ["{", "}"], "gold": 0}
    assert read_task(write(tmp_path / "b.jsonl", braces)).cases[0].prompts[0] == "{x} {}"
    many = write(tmp_path / "many.jsonl", *[CHOICE | {"query": str(n)} for n in range(30)])
    drawn = read_task(many, samples=10, seed=3)
    numbers = [int(case.prompts[0]) for case in drawn.cases]
    assert len(set(numbers)) == 10 and numbers == sorted(numbers) and drawn.total == 30
    assert read_task(many, samples=10, seed=3) == drawn != read_task(many, samples=10, seed=4)
    assert len(read_task(many, samples=99).cases) == 30
    (tmp_path / "few").mkdir()
    write(tmp_path / "few" / "z.jsonl", CLOZE)
    write(tmp_path / "few" / "a.jsonl", CLOZE)
    assert [task.name for task in tasks_from([tmp_path / "few"])] == ["a", "z"]
    with pytest.raises(SupremumError, match="Two tasks are named a"):
        tasks_from([tmp_path / "few", tmp_path / "few" / "a.jsonl"])


@pytest.mark.parametrize("line, cause", [
    ("", "holds no cases"),
    ("\n \r\n", "holds no cases"),
    ("{", r"line 1 is not JSON"),
    ("\xff\xfe", r"line 1 is not JSON"),
    ("[1]", "line 1: is no case .it has a list"),
    ('{"query": "q", "choices": ["a", "b"]}', "line 1: is no case .it has 'query', 'choices'"),
    ('{"query": "q", "choices": ["a"], "gold": 0}', "line 1: the choices are not two"),
    ('{"query": "q", "choices": ["a", ""], "gold": 0}', "line 1: the choices are not two"),
    ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 1: gold is 2, of 2 choices"),
    ('{"query": "q", "choices": ["a", "b"], "gold": true}', "line 1: gold is True"),
    ('{"query": 3, "choices": ["a", "b"], "gold": 0}', 'line 1: "query" is not a text'),
    ('\n{"context": "c", "continuation": ""}', 'line 2: "continuation" is not a text'),
    ('{"context": "\\ud800", "continuation": "x"}', "line 1: holds half of a surrogate pair"),
    ('{"context": "c", "continuation": "x"}\n{"query": "q", "choices": ["a", "b"], "gold": 0}', "cloze cases among"),
])
def test_files_that_are_refused(line, cause, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(SupremumError, match=cause) as error:
        read_task(tmp_path / "bad.jsonl")
    assert str(tmp_path / "bad.jsonl") in error.value.cause and error.value.remedy


def test_what_is_missing_or_cannot_answer(tiny_model, tmp_path):
    with pytest.raises(SupremumError, match="No such file"):
        tasks_from([tmp_path / "none.jsonl"])
    with pytest.raises(SupremumError, match=r"holds no \.jsonl files"):
        tasks_from([tmp_path])
    with pytest.raises(SupremumError, match=r"a BertForMaskedLM predicts no next tokens"):
        score_tasks(open_checkpoint(tiny_model("bert")), [read_task(write(tmp_path / "l.jsonl", CLOZE))])


def test_a_model_against_itself_and_a_disturbed_one(tiny_model, tmp_path):
    folder = tiny_model("llama")
    task = read_task(write(tmp_path / "t.jsonl", *[CHOICE | {"query": f"The river at {n} carries"} for n in range(12)]))
    one, other = open_checkpoint(folder), open_checkpoint(disturbed(folder, tmp_path / "other", 0.5))
    (same,) = evaluate_tasks(one, one, [task]).tasks
    assert same.flips == {"gained": 0, "lost": 0, "p": 1.0} and same.margin_change.value == 0
    (changed,) = evaluate_tasks(other, one, [task]).tasks
    assert changed.acc_reference == same.acc and changed.margin_change.value != 0
    before, after = [score_tasks(checkpoint, [task])[0] for checkpoint in (one, other)]
    assert changed.margin_change.value == pytest.approx((after.margin - before.margin).mean())


def test_long_prompts_lose_their_beginning(tiny_model, tmp_path):
    folder = tiny_model("gpt2")
    long = CLOZE | {"context": "The river carries the stone and " * 80}
    (got,) = score_tasks(open_checkpoint(folder), [read_task(write(tmp_path / "l.jsonl", long, CLOZE))])
    assert got.truncated == 1
    tokenizer, model = open_checkpoint(folder).tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(f"{long['context'].rstrip()} {CLOZE['continuation']}").input_ids
    count = len(ids) - len(tokenizer(long["context"].rstrip()).input_ids)
    assert got.margin[0] == pytest.approx(by_the_book(model, Text(ids[-256:], 256 - count))[0], rel=1e-3)


def test_the_command_line(tiny_model, tmp_path):
    folder = str(tiny_model("llama"))
    write(tmp_path / "a_task_with_a_long_name.jsonl", *[CHOICE] * 6)
    for group in ("male", "female"):
        write(tmp_path / f"gender_{group}.jsonl", *[CONTEXT] * 4)
    write(tmp_path / "words.jsonl", CLOZE, CLOZE)
    run = CliRunner().invoke(app, ["evaluate", folder, "--reference", folder, "--tasks", str(tmp_path), "--samples", "3",
                                   "--json"])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert {task["name"]: task["cases"] for task in document["tasks"]} == {
        "a_task_with_a_long_name": 3, "gender_male": 3, "gender_female": 3, "words": 2}
    assert document["tasks"][0]["flips"] == {"gained": 0, "lost": 0, "p": 1.0} and document["gaps"][0]["name"] == "gender"
    alone = CliRunner().invoke(app, ["evaluate", folder, "--tasks", str(tmp_path / "words.jsonl")])
    assert alone.exit_code == 0 and "words" in alone.stdout and "original" not in alone.stdout
    checkpoint = open_checkpoint(folder)
    console = Console(width=80, file=io.StringIO())
    console.print(render_tasks(evaluate_tasks(checkpoint, checkpoint, tasks_from([tmp_path]))))
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
    assert "95 %" in console.file.getvalue() and "by length" in console.file.getvalue()
