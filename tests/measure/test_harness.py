"""The harness's tasks: a small one of its own kind on local data, against the same cases by our own reader."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from supremum.checkpoint import open_checkpoint
from supremum.errors import SupremumError
from supremum.measure import evaluate_tasks
from supremum.measure.cases import read_task
from supremum.measure.harness import evaluate_harness, language_model

from .test_evaluate import disturbed

NOUNS = ["river", "stone", "teacher", "engine", "window", "garden", "letter", "market"]


def test_a_missing_harness_names_its_extra(monkeypatch, tiny_model):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SupremumError, match=r"needs lm_eval.*supremum\[harness\]"):
        evaluate_harness(tiny_model("llama"), None, ["arc_easy"])


def test_rolling_likelihoods_and_greedy_text(tiny_model):
    """The whole of a text longer than the context, every token once; and what generate writes, up to the stop."""
    pytest.importorskip("lm_eval")
    checkpoint = open_checkpoint(tiny_model("llama"))
    answers, tokenizer = language_model(checkpoint), checkpoint.tokenizer()
    stock = checkpoint.model(torch.float32)
    text = "The river carries the stone. " * 60
    (got,) = answers.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids, limit, total = tokenizer(text).input_ids, 255, 0.0
    with torch.inference_mode():
        for start in range(0, len(ids), limit):
            window = ids[start:start + limit]
            before = [tokenizer.bos_token_id] if start == 0 else ids[start + len(window) - 1 - limit:start]
            logp = stock(torch.tensor([[*before, *window]])).logits[0].log_softmax(-1)
            total += sum(logp[len(before) + i - 1, token].item() for i, token in enumerate(window))
        written = stock.generate(torch.tensor([tokenizer("The river").input_ids]), max_new_tokens=8, do_sample=False)
    assert got == pytest.approx(total, rel=1e-3)
    whole = tokenizer.decode(written[0, len(tokenizer("The river").input_ids):], skip_special_tokens=True)
    stop = whole[len(whole) // 2]
    (got,) = answers.generate_until([SimpleNamespace(args=("The river", {"until": [stop], "max_gen_toks": 8}))])
    assert got == whole.split(stop)[0] and stop not in got


def test_a_local_task_agrees_with_our_own_reader(tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"query": f"The {noun} moves the", "choices": [f"{NOUNS[i - 1]} and {NOUNS[i - 2]}", "bridge"], "gold": i % 2}
            for i, noun in enumerate(NOUNS)]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(tmp_path / "cases.jsonl")}}
    config = {"task": "local", "dataset_path": "json", "dataset_kwargs": files, "output_type": "multiple_choice",
              "test_split": "test", "doc_to_text": "{{query}}", "doc_to_choice": "choices",
              "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    folder = tiny_model("llama")
    other = disturbed(folder, tmp_path / "other", 0.5)
    (row,) = [row for row in evaluate_harness(other, folder, [config]) if row["metric"] == "acc"]
    (own,) = evaluate_tasks(open_checkpoint(other), open_checkpoint(folder), [read_task(tmp_path / "cases.jsonl")]).tasks
    assert row["value"] == own.acc.value and row["reference"] == own.acc_reference.value
    assert {name: row[name] for name in ("gained", "lost", "p")} == own.flips
