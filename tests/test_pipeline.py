"""The main job end to end on tiny real transformers: budgets, targets, resume, refusals."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from supremum import Budget, SupremumError, convert, measure_limits, open_checkpoint, optimize, output, pipeline
from supremum.errors import BudgetError, StateError
from supremum.frontier import optimize_frontier
from supremum.gather import HELD_OUT_TOKENS, window_length
from supremum.measure.quality import evaluate
from supremum.output import check_output
from supremum.report import read_document
from supremum.text import calibration_and_held_out
from supremum.workspace import Workspace, work_folder

TOKENS = 1024
CHILD = """
import sys
from supremum import Budget, optimize
optimize(sys.argv[1], Budget(size=int(sys.argv[4])), text=[sys.argv[2]], tokens=1024, out=sys.argv[3], dtype="float32")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    words = ["river", "stone", "teacher", "engine", "window", "garden", "letter", "market", "winter", "bridge"]
    path.write_text("\n\n".join(f"The {words[i % 10]} moves the {words[i * 7 % 10]} {i} times past {words[i * 3 % 10]}."
                                for i in range(4000)))
    return str(path)


def files(folder: Path) -> dict[str, str]:
    """Hashes of what the runtime needs; the report holds times."""
    own = {"supremum.json", "report.html", "README.md"}
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name not in own}


def run(model, text, out, budget, **options):
    return optimize(model, budget, text=[text], tokens=TOKENS, out=out, dtype="float32", **options)


def kl_of_file(model, folder, text):
    """Of what stands in `folder`, measured on the run's held-out windows."""
    original = open_checkpoint(model)
    _, held_out = calibration_and_held_out(original, [text], tokens=TOKENS, held_out_tokens=HELD_OUT_TOKENS,
                                           length=window_length(original), seed=0)
    return evaluate(open_checkpoint(folder), original, held_out).kl_mean


def test_gguf_within_the_budget_and_proved(tiny_model, text, tmp_path):
    model = tiny_model("llama", hidden_size=256, intermediate_size=512)
    with pytest.raises(BudgetError, match=r"smallest gguf file") as refused:
        run(model, text, tmp_path / "out", Budget(size=1000))
    least = int(str(refused.value).split("(")[1].split(" bytes")[0])
    budget = int(least * 1.25)
    result = run(model, text, tmp_path / "out", Budget(size=budget))
    written = tmp_path / "out" / "model.gguf"
    assert 0.97 * budget <= written.stat().st_size <= budget
    document = read_document(tmp_path / "out")
    assert document["proof"]["passed"] and document["result"]["bytes"] == written.stat().st_size
    assert 0 < document["result"]["measured"]["kl_mean"] == pytest.approx(kl_of_file(model, tmp_path / "out", text), rel=2e-3)
    assert document["result"]["gains"]["kl_after"] < document["result"]["gains"]["kl_before"]
    assert sum(layer["share"] for layer in document["plan"]) == pytest.approx(1)
    assert not (tmp_path / "out.work").exists() and (tmp_path / "out" / "report.html").stat().st_size > 10_000
    again = run(model, text, tmp_path / "out", Budget(size=budget))
    assert again.document == result.document  # finished work is not done twice
    same = run(model, text, tmp_path / "same", Budget(size=budget))
    assert files(same.folder) == files(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("only", [["IQ1_S", "IQ2_XXS", "IQ3_XXS"], None])
def test_vector_types_where_few_bits_are_asked_for(tiny_model, text, tmp_path, only):
    """Below Q2_K's bits, chosen among, proved in llama.cpp, and of the KL that was measured."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=512)
    result = run(model, text, tmp_path / "out", Budget(bits=2.3), only=only)
    assert 0.9 * 2.3 <= result.document["result"]["bits_per_weight"] <= 2.3 and result.document["proof"]["passed"]
    taken = {layer["codec"] for layer in result.document["plan"]}
    assert any(name.startswith("IQ2") for name in taken) and (only is None or taken <= {*only, "as it is"})
    kl = result.document["result"]["measured"]["kl_mean"]
    assert 0 < kl == pytest.approx(kl_of_file(model, tmp_path / "out", text), rel=2e-3)


def test_the_least_formats_that_were_asked_for_stay_whatever_the_budget(tiny_model, text, tmp_path):
    model = tiny_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    result = run(model, text, tmp_path / "out", Budget(bits=12), only=["IQ2_XXS"])
    assert result.document["proof"]["passed"] and "IQ2_XXS" in {layer["codec"] for layer in result.document["plan"]}


@pytest.mark.slow
def test_a_budget_that_is_met_without_them_is_not_offered_the_least_formats(tiny_model, text, tmp_path, monkeypatch):
    """Not beside a point that needs them, nor after a killed run that did."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=512)
    alone = run(model, text, tmp_path / "alone", Budget(bits=4.5))
    drawn = optimize_frontier(model, [2.3, 4.5], text=[text], tokens=TOKENS, out=tmp_path / "drawn", dtype="float32").folder
    assert files(drawn / "4.5") == files(alone.folder)
    assert any(layer["codec"].startswith(("IQ1", "IQ2")) for layer in read_document(drawn / "2.3")["plan"])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, text, tmp_path / "killed", Budget(bits=2.3))
    assert files(run(model, text, tmp_path / "killed", Budget(bits=4.5)).folder) == files(alone.folder)


def test_compressed_tensors_at_bits(tiny_model, text, tmp_path):
    model = tiny_model("qwen3", hidden_size=128, intermediate_size=256)
    result = run(model, text, tmp_path / "out", Budget(bits=4.5), target="compressed-tensors")
    assert 0.97 * 4.5 <= result.document["result"]["bits_per_weight"] <= 4.5
    assert result.document["proof"]["runtime"] == "transformers" and result.document["proof"]["passed"]
    first = [layer for layer in result.document["plan"] if ".layers.0." in layer["name"]]
    codecs = {layer["name"].split(".")[-2]: layer["codec"] for layer in first}
    assert codecs["q_proj"] == codecs["k_proj"] == codecs["v_proj"] and codecs["gate_proj"] == codecs["up_proj"]


@pytest.mark.parametrize(("codec", "bits"), [
    ("int8-channel-a8", 8.5), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("fp8-channel-a8", 8.5), ("fp8-b128", 8.5), ("uint2-g64", 2.5), ("nvfp4-g16", 4.7)))])  # fmt: skip
def test_one_format_and_its_measured_kl_is_that_of_the_file(tiny_model, text, tmp_path, codec, bits):
    """Inputs that the file's layers round are rounded when the plan is measured, and when the file is."""
    model = tiny_model("llama", "bfloat16", hidden_size=128, intermediate_size=256)
    result = run(model, text, tmp_path / "out", Budget(bits=bits), target="compressed-tensors", only=[codec])
    document = result.document
    assert document["proof"]["passed"] and {layer["codec"] for layer in document["plan"]} == {codec, "as it is"}
    assert any(line.startswith("Size only") for line in document["assumptions"])
    assert any("-a8" in line for line in document["assumptions"]) == codec.endswith("-a8")
    smoothing = document["result"]["smoothing"]
    assert smoothing is None if not codec.endswith("-a8") else len(smoothing["pairs"]) == 8 and not smoothing["not_folded"]
    measured = document["result"]["measured"]["kl_mean"]
    found = kl_of_file(model, tmp_path / "out", text)
    assert found == pytest.approx(measured, rel=0.01 if codec.startswith("uint") else 2e-3)


def test_without_a_choice_nothing_is_priced_and_the_file_is_the_same(tiny_model, text, tmp_path, monkeypatch):
    """One format, the tables kept, no room for more. A killed run's unpriced statistics serve no budget with a choice."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    options = {"target": "compressed-tensors", "only": ["int4-g64"], "keep": ["embed", "lm_head"]}
    priced = Mock(wraps=pipeline.solve_candidates)
    monkeypatch.setattr(pipeline, "solve_candidates", priced)
    alone = run(model, text, tmp_path / "alone", Budget(bits=4.3), **options)
    assert not priced.called and alone.document["proof"]["passed"]
    inner = [layer for layer in alone.document["plan"] if layer["codec"] == "int4-g64"]
    assert len(inner) == 14 and all(layer["predicted_nats"] > 0 for layer in inner)
    with monkeypatch.context() as patch:
        patch.setattr("supremum.job.only_plan", lambda *given: None)
        chosen = run(model, text, tmp_path / "chosen", Budget(bits=4.3), **options)
    assert priced.called and files(chosen.folder) == files(alone.folder)
    assert any("no candidate was priced" in line for line in alone.document["assumptions"])
    assert not any("no candidate was priced" in line for line in chosen.document["assumptions"])


def test_the_remedy_of_too_few_bits_works(tiny_model, text, tmp_path):
    """It leaves one plan of a menu of several formats."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    options = {"target": "compressed-tensors", "only": ["int4-g64", "int8-g64"]}
    with pytest.raises(BudgetError, match=r"--bits ([0-9.]+) or more") as refused:
        run(model, text, tmp_path / "out", Budget(bits=1), **options)
    bits = float(str(refused.value).split("--bits ")[1].split(" or more")[0])
    result = run(model, text, tmp_path / "out", Budget(bits=bits), **options).document
    assert {layer["codec"] for layer in result["plan"]} == {"int4-g64", "as it is"} and result["proof"]["passed"]


@pytest.mark.parametrize(("first", "second", "at"), [
    (4.3, 12, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (4.3, 12, "fisher/0001"), (12, 4.3, "fisher/0001"), (12, 4.3, None)))])  # fmt: skip
def test_what_a_killed_run_left_serves_another_budget_or_is_made_again(tiny_model, text, tmp_path, monkeypatch, first, second,
                                                                       at):
    """One of the two budgets leaves a choice. Killed after the statistics, or in the backward sweep."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    options = {"target": "compressed-tensors", "only": ["int4-g64"]}
    save = Workspace.save

    def kills(self, name, tensors):
        save(self, name, tensors)
        if at is not None and name.startswith(at):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save", kills)
        patch.setattr(pipeline, "finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, text, tmp_path / "killed", Budget(bits=first), **options)
    assert (tmp_path / "killed.work" / "fisher").exists()
    other = run(model, text, tmp_path / "killed", Budget(bits=second), **options)
    assert files(other.folder) == files(run(model, text, tmp_path / "other", Budget(bits=second), **options).folder)


def test_largest_kl_holds(tiny_model, text, tmp_path):
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    result = run(model, text, tmp_path / "out", Budget(max_kl=0.05))
    assert result.document["result"]["measured"]["kl_mean"] <= 0.05


def test_keep_leaves_layers_as_they_are(tiny_model, text, tmp_path):
    model = tiny_model("llama")
    result = run(model, text, tmp_path / "out", Budget(bits=12), keep=["v_proj"])
    kept = [layer for layer in result.document["plan"] if "v_proj" in layer["name"]]
    assert len(kept) == 2 and all(layer["codec"] == "as it is" and layer["bits_per_weight"] == 32 for layer in kept)
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(before.read(name).float(), after.read(name).float())
    assert not torch.equal(before.read(name.replace("v_proj", "o_proj")), after.read(name.replace("v_proj", "o_proj")))


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi3"])
def test_other_decoders(tiny_model, text, tmp_path, family):
    result = run(tiny_model(family), text, tmp_path / "out", Budget(bits=6))
    assert result.document["proof"]["passed"]


@pytest.mark.parametrize("family", ["bert", pytest.param("albert", marks=pytest.mark.slow)])
def test_encoders(tiny_model, text, tmp_path, family):
    result = run(tiny_model(family), text, tmp_path / "out", Budget(bits=5), target="compressed-tensors")
    assert result.document["proof"]["passed"] and result.document["result"]["bits_per_weight"] <= 5


@pytest.mark.parametrize(("family", "architecture"), [
    pytest.param("bert", "BertModel", marks=pytest.mark.slow), ("bert", "BertForSequenceClassification"), ("electra", None)])
def test_encoder_without_a_vocabulary_head(family, architecture, tiny_model, text, tmp_path):
    """Its hidden states are compared: a KL, and nothing that needs a vocabulary. A task's head stays as it is."""
    model = tiny_model(family, architecture=architecture)
    result = run(model, text, tmp_path / "out", Budget(bits=5), target="compressed-tensors")
    measured = result.document["result"]["measured"]
    assert result.document["proof"]["passed"] and measured["objective"] == "none"
    assert measured["kl_mean"] > 0 and measured["perplexity"] is None and measured["same_top"] is None


def test_killed_run_resumes_to_the_same_bytes(tiny_model, text, tmp_path):
    model = tiny_model("llama", num_hidden_layers=3)
    whole = run(model, text, tmp_path / "whole", Budget(size=140_000))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", CHILD, str(model), text, str(tmp_path / "killed"), "140000"]
    state = tmp_path / "killed.work"
    for wanted in ("windows.safetensors", "moments/0001.safetensors", "candidates/0001.safetensors",
                   "fisher/0001.safetensors", "size-140000/verified.json",
                   "size-140000/solved0/block/0001.safetensors"):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (state / wanted).exists():
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
    assert files(tmp_path / "killed") == files(whole.folder)


@pytest.mark.slow
def test_another_budget_uses_what_is_gathered(tiny_model, text, tmp_path, monkeypatch):
    model = tiny_model("llama")
    with pytest.raises(BudgetError, match="cannot be reached"):
        run(model, text, tmp_path / "out", Budget(bits=6, max_kl=1e-9))
    gathered = {path: path.stat().st_mtime_ns for name in ("moments", "candidates", "fisher")
                for path in (tmp_path / "out.work" / name).iterdir()}
    result = None
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "discard", lambda self: None)
        result = run(model, text, tmp_path / "out", Budget(bits=6))
    assert len(gathered) > 6 and gathered == {path: path.stat().st_mtime_ns for path in gathered}
    seconds = {phase["name"]: phase["seconds"] for phase in result.document["phases"]}
    assert seconds["gather moments"] > 0  # of the run that failed
    assert files(run(model, text, tmp_path / "same", Budget(bits=6)).folder) == files(result.folder)


def test_too_few_tokens_are_refused_before_any_work(tiny_model, text, tmp_path):
    with pytest.raises(SupremumError, match=r"31 tokens are less than one window of.*--tokens"):
        optimize(tiny_model("llama"), Budget(bits=6), text=[text], tokens=31, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_state_of_another_run_is_refused_by_name(tiny_model, text, tmp_path):
    model = tiny_model("llama")
    workspace = Workspace(tmp_path / "out.work", {"model": "another", "seed": 0})
    with pytest.raises(StateError, match="using this output"):
        run(model, text, tmp_path / "out", Budget(bits=6))
    workspace.close()
    with pytest.raises(StateError, match="model"):
        run(model, text, tmp_path / "out", Budget(bits=6))
    assert run(model, text, tmp_path / "out", Budget(bits=6), fresh=True).folder.exists()


def test_output_that_would_destroy_something_is_refused(tiny_model, text, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(SupremumError, match="holds the model"):
        run(model, text, model, Budget(bits=6))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SupremumError, match="no Supremum output"):
        run(model, text, tmp_path / "mine", Budget(bits=6))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("out", [".", "..", "sub/..", "/"])
def test_the_folder_that_the_command_runs_in_is_no_output(tiny_model, text, tmp_path, monkeypatch, out):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    model = tiny_model("llama")
    for job in (lambda: run(model, text, out, Budget(bits=6)), lambda: convert(model, "gguf", out)):
        with pytest.raises(SupremumError, match="the command runs inside it"):
            job()
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "sub"]


def test_a_mount_point_is_no_output(tiny_model, text, tmp_path, monkeypatch):
    out, model = tmp_path / "disk", tiny_model("llama")
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    for job in (lambda: run(model, text, out, Budget(bits=6)), lambda: convert(model, "gguf", out)):
        with pytest.raises(SupremumError, match=r"mounted there.*disk/small"):
            job()
    check_output(out / "small", open_checkpoint(model))


def test_the_state_lies_beside_the_output_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert work_folder(Path("../small")) == work_folder(Path("../other/../small/.")) == tmp_path / "small.work"


@pytest.mark.slow
def test_an_edited_folder_of_text_is_another_run(tiny_model, text, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(Path(text).read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model("llama")
    first = run(model, "~/corpus", tmp_path / "out", Budget(bits=6)).document
    assert run(model, "~/corpus", tmp_path / "out", Budget(bits=6)).document == first
    (tmp_path / "corpus" / "b.md").write_text("Another page. " * 2000)
    with pytest.raises(SupremumError, match=r"out: holds another result, made by `supremum optimize .*--fresh"):
        run(model, "~/corpus", tmp_path / "out", Budget(bits=6))
    assert run(model, "~/corpus", tmp_path / "out", Budget(bits=6), fresh=True).document != first


def test_missing_text_is_refused_before_anything_is_made(tiny_model, tmp_path):
    for model, source, message in ((tiny_model("llama"), [str(tmp_path / "none.txt")], "no such file"),
                                   (tiny_model("bert"), [], "does not write text.*--text")):
        with pytest.raises(SupremumError, match=message):
            optimize(model, Budget(bits=6), target="compressed-tensors", text=source, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_only_some_formats_and_the_command_that_repeats_the_run(tiny_model, text, tmp_path):
    model = tiny_model("llama")
    result = run(model, text, tmp_path / "out", Budget(bits=6), only=["Q8_0", "Q5_0"])
    assert {layer["codec"] for layer in result.document["plan"]} <= {"Q5_0", "Q8_0", "as it is"}
    words = result.document["command"].split()
    found = [words[i:i + 2] for i, word in enumerate(words) if word in ("--only", "--dtype", "--text")]
    assert found == [["--text", text], ["--only", "Q5_0"], ["--only", "Q8_0"], ["--dtype", "float32"]]
    with pytest.raises(SupremumError, match=r"has no format Q99.*Choose among: .*Q4_0, .*Q8_0"):
        run(model, text, tmp_path / "other", Budget(bits=6), only=["Q4_0", "Q99"])


def test_infeasible_budgets_name_what_is_feasible(tiny_model, text, tmp_path):
    with pytest.raises(BudgetError, match="the least to be had is"):
        run(tiny_model("llama"), text, tmp_path / "out", Budget(bits=1.5))
    with pytest.raises(BudgetError, match="cannot be reached"):
        run(tiny_model("llama"), text, tmp_path / "out2", Budget(bits=4.6, max_kl=1e-9))


@pytest.fixture(scope="module")
def finished(tiny_model, text, tmp_path_factory):
    """The folder of a finished run at 6 bits; copy it before use."""
    return run(tiny_model("llama"), text, tmp_path_factory.mktemp("finished") / "out", Budget(bits=6)).folder


def test_a_result_is_replaced_only_when_told_and_a_told_run_resumes(finished, tiny_model, text, tmp_path):
    model, out = tiny_model("llama"), shutil.copytree(finished, tmp_path / "out")
    first = read_document(out)
    with pytest.raises(SupremumError, match="holds another result"):
        run(model, text, out, Budget(bits=7))
    with pytest.raises(SupremumError, match="holds another result"):
        convert(model, "gguf", out)
    assert read_document(out) == first and not (tmp_path / "out.work").exists()
    Workspace(tmp_path / "out.work", first["inputs"]["state"]).close()  # as a killed run with fresh=True leaves it
    assert run(model, text, out, Budget(bits=7)).document["budget"]["bits"] == 7


@pytest.mark.parametrize("left", ["whole", "without steps", "only its lock", "another's", "in use"])
def test_what_a_run_killed_at_its_end_left_is_removed(finished, tiny_model, text, tmp_path, left):
    document = read_document(shutil.copytree(finished, tmp_path / "out"))
    inputs = document["inputs"]["state"] if left != "another's" else {"model": "another"}
    workspace = Workspace(tmp_path / "out.work", inputs)
    if left in ("whole", "another's", "in use"):
        workspace.json("final0/step.json", dict)
    if left == "only its lock":
        (tmp_path / "out.work" / "state.json").unlink()
    if left != "in use":
        workspace.close()
    assert run(tiny_model("llama"), text, tmp_path / "out", Budget(bits=6)).document == document
    workspace.close()
    assert (tmp_path / "out.work").exists() == (left in ("another's", "in use"))


def test_a_result_whose_model_is_no_longer_whole_is_not_finished(finished, tiny_model, text, tmp_path, monkeypatch):
    model, out = tiny_model("llama"), shutil.copytree(finished, tmp_path / "out")
    for spoil in (lambda: os.truncate(out / "model.gguf", 1000), (out / "model.gguf").unlink):
        spoil()
        with pytest.raises(StateError, match=r"model\.gguf: holds (1000|0) bytes of the model, .*--fresh"):
            run(model, text, out, Budget(bits=6))
    monkeypatch.setattr(output, "verify", lambda *_: SimpleNamespace(asdict=dict))
    folder = convert(model, "compressed-tensors", tmp_path / "plain")
    (folder / "notes.txt").write_text("mine")
    assert convert(model, "compressed-tensors", tmp_path / "plain") == folder
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(StateError, match=r"bytes of the model, .*--fresh"):
        convert(model, "compressed-tensors", tmp_path / "plain")
    assert convert(model, "compressed-tensors", tmp_path / "plain", fresh=True) == folder


def test_targets_that_a_verb_cannot_write_are_refused(tiny_model, tmp_path):
    with pytest.raises(SupremumError, match=r"gptq is for `supremum optimize` alone.*compressed-tensors"):
        convert(tiny_model("llama"), "gptq", tmp_path / "out")
    with pytest.raises(SupremumError, match="int8 is for `supremum convert` alone"):
        optimize(tiny_model("llama"), Budget(bits=4), target="int8", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_conversions_to_one_place_do_not_meet(tiny_model, tmp_path, monkeypatch):
    model, during = tiny_model("llama"), []

    def second(*_):
        with pytest.raises(StateError, match="another run is using this output"):
            convert(model, "gguf", tmp_path / "out")
        during.append(True)
        return SimpleNamespace(asdict=dict)

    monkeypatch.setattr(output, "verify", second)
    assert convert(model, "gguf", tmp_path / "out").exists() and during == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written")])
def test_what_the_disk_refuses_a_conversion_is_said(tiny_model, tmp_path, monkeypatch, number, said):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("supremum.checkpoint.write_gguf.GGUFTarget.write", refuse)
    with pytest.raises(SupremumError, match=said):
        convert(tiny_model("llama"), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_convert_keeps_every_weight_and_can_be_repeated(tiny_model, tmp_path):
    model = tiny_model("llama", dtype="bfloat16")
    written = convert(model, "gguf", tmp_path / "plain")
    before, after = open_checkpoint(model), open_checkpoint(written)
    assert all(torch.equal(before.read(name).float(), after.read(name).float()) for name in before.tensors)
    assert json.loads((tmp_path / "plain" / "converted.json").read_text())["proof"]["passed"]
    state = written.stat().st_mtime_ns
    assert convert(model, "gguf", tmp_path / "plain") == written and written.stat().st_mtime_ns == state
    with pytest.raises(SupremumError, match=r"another result, made by `supremum convert .*--target gguf"):
        convert(model, "compressed-tensors", tmp_path / "plain")
    folder = convert(model, "compressed-tensors", tmp_path / "plain", fresh=True)
    assert folder == tmp_path / "plain" and not written.exists()
    assert convert(folder, "gguf", tmp_path / "back").exists()


def test_a_conversion_that_is_not_proved_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    def refuse(*_):
        raise SupremumError("answers differently")

    monkeypatch.setattr(output, "verify", refuse)
    with pytest.raises(SupremumError, match="answers differently"):
        convert(tiny_model("llama"), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_limits_of_a_model(tiny_model, text):
    found = measure_limits(tiny_model("llama"), text=[text], tokens=TOKENS, dtype="float32").to_dict()
    curve = found["information"]["curve"]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(curve))
    assert json.dumps(found) and found["hardware"]["ceilings"]


@pytest.mark.parametrize(("target", "bits", "only"), [
    ("compressed-tensors", 4.3, ["int4-g64"]), ("gguf", 6, None), ("archive", 3, None)])
def test_quick_trains_nothing_and_is_still_what_it_says(tiny_model, text, tmp_path, monkeypatch, target, bits, only):
    """One plan, a choice of formats, and a water level: no final solve, and the file has the KL that was measured."""
    monkeypatch.setattr("supremum.reach.solve_final", Mock(side_effect=AssertionError))
    monkeypatch.setattr("supremum.fill.solve_final", Mock(side_effect=AssertionError))
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    options = {"target": target, "only": only, "keep": ["embed", "lm_head"] if only else []}
    found = run(model, text, tmp_path / "out", Budget(bits=bits), quick=True, **options).document
    assert found["proof"]["passed"] and found["result"]["gains"] is None and "--quick" in found["command"]
    assert any("--quick" in line for line in found["assumptions"])
    assert bits * 0.8 < found["result"]["bits_per_weight"] <= bits
    assert all(layer["predicted_nats"] > 0 for layer in found["plan"] if layer["codec"] != "as it is")
    assert kl_of_file(model, tmp_path / "out", text) == pytest.approx(found["result"]["measured"]["kl_mean"], rel=5e-3)
    monkeypatch.undo()
    whole = run(model, text, tmp_path / "out", Budget(bits=bits), fresh=True, **options).document
    assert whole["result"]["measured"]["kl_mean"] < found["result"]["measured"]["kl_mean"]
    assert "--quick" not in whole["command"] and "quick" not in whole["inputs"]["options"]
