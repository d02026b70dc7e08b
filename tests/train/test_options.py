"""What a recipe may switch on: bf16, gradient checkpointing, compiling, curves elsewhere, adapters on quantised bases."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import target
from supremum.errors import SupremumError
from supremum.solve import nearest
from supremum.train.checkpoints import checkpoints
from supremum.train.models import FAMILIES
from supremum.train.pretrain import train
from supremum.train.several import tune_several
from supremum.train.trainer import _plain_failures, check
from supremum.train.tune import tune
from supremum.train.watch import Watch
from tests.checkpoint.gguf_files import convert
from tests.train.test_pretrain import data, recipe  # noqa: F401  (data: the fixture)
from tests.train.test_trainer import At, model, run, weights
from tests.train.test_trainer import recipe as training
from tests.train.test_tune import recipe as tuning


def losses(document: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in document["curve"]] + [document["held_out"]["loss"]]


def stop(step: int) -> At:
    return At(step, lambda **_: os.kill(os.getpid(), signal.SIGINT))


def test_bf16_trains_float_weights_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    kinds = set()

    def seen(module: Any, inputs: Any, output: torch.Tensor) -> None:
        kinds.add(output.dtype)

    def watched() -> Any:
        made = model()
        made.transformer.h[0].mlp.c_fc.register_forward_hook(seen)
        return made

    whole = run(tmp_path / "whole", training(precision="bf16"), trained=watched())
    assert kinds == {torch.bfloat16} and {w.dtype for w in weights(whole)} == {torch.float32}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", training(precision="bf16"), stop(5))
    resumed = run(tmp_path / "cut", training(precision="bf16"))
    assert resumed.resumed_from == 6 and resumed.state.curve == whole.state.curve
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    exact = run(tmp_path / "exact", training())
    for (_, a, _), (_, b, _) in zip(exact.state.curve, whole.state.curve, strict=True):
        assert a == pytest.approx(b, abs=0.02) and a != b


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "albert"])
def test_computing_blocks_again_changes_no_loss(family: str, data: Path, tmp_path: Path,  # noqa: F811
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    calls, before = {"n": 0}, torch.utils.checkpoint.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        calls["n"] += 1
        return before(*arguments, **options)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    plain = train(recipe(tmp_path, family, steps=4), data, tmp_path / "plain")
    assert calls["n"] == 0
    again = train(recipe(tmp_path, family, steps=4, gradient_checkpointing=True), data, tmp_path / "again")
    assert calls["n"] >= 4 and losses(again) == pytest.approx(losses(plain), abs=1e-5)


def test_a_model_whose_blocks_are_not_computed_again_is_refused(data: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(SupremumError, match=r"gradient_checkpointing: .*AlbertForMaskedLM.*Leave it out"):
        train(recipe(tmp_path, "albert", gradient_checkpointing=True), data, tmp_path / "m")


@pytest.mark.parametrize("way", ["full", "lora"])
def test_several_tasks_compute_blocks_again(way: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    one = json.loads(tuning(tmp_path, tiny_model("bert"), way, epochs=0.5, lstm=False).read_text())
    part = {"task": one.pop("task"), "data": one.pop("data")}
    (tmp_path / "both.yaml").write_text(json.dumps(one | {"tasks": {"a": part, "b": part}}))
    plain, again = (tune_several(tmp_path / "both.yaml", tmp_path, tmp_path / name, changes=changes)
                    for name, changes in (("plain", []), ("again", ["gradient_checkpointing=true"])))
    assert plain["a"].loss is not None and again["a"].loss == pytest.approx(plain["a"].loss, abs=1e-5)
    stored = [load_file(tmp_path / name / "b" / "model.safetensors") for name in ("plain", "again")]
    assert all(torch.allclose(value, stored[1][name], atol=1e-5) for name, value in stored[0].items())


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiling_changes_no_loss_and_the_folder_is_plain(data: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = train(recipe(tmp_path, "gpt2", steps=4), data, tmp_path / "plain")
    compiled = train(recipe(tmp_path, "gpt2", steps=4, compile=True), data, tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supremum.train.trainer.shutil.which", lambda name: None)
    with pytest.raises(SupremumError, match=r"compile: .*C\+\+ compiler.*Install g\+\+"):
        check(training(compile=True))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_missing_is_refused_with_its_remedy(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supremum.train.trainer.find_spec", lambda package: None)
    with pytest.raises(SupremumError, match=rf"log_to: {name} is not installed.*pip install 'supremum\[{name}\]'"):
        check(training(log_to=name))


def test_what_a_tracker_refuses_is_said_with_its_name(tmp_path: Path) -> None:
    refusal = type("MlflowException", (Exception,), {"__module__": "mlflow.exceptions"})
    with pytest.raises(SupremumError, match=r"log_to: mlflow fails \(no such store\)\. Set it up"), \
            _plain_failures(tmp_path, "mlflow"):
        raise refusal("no such store\nmore")
    with pytest.raises(refusal), _plain_failures(tmp_path, "wandb"):
        raise refusal("not its own")


def test_curves_are_kept_beside_the_output_and_hold_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    wanted = training(log_to="tensorboard", checkpoint_every=3, log_every=1, steps=8)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.work", wanted, stop(5))  # after the sixth, at the end of the step under way
    shutil.rmtree(checkpoints(tmp_path / "out.work")[0])  # so that steps 4 to 6 come again
    done = run(tmp_path / "out.work", wanted)
    assert done.resumed_from == 3
    shutil.rmtree(tmp_path / "out.work")  # as at the end of a whole run
    found = EventAccumulator(str(tmp_path / "out.tensorboard"))
    found.Reload()
    points = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert points == [(step, pytest.approx(loss, abs=1e-3)) for step, loss, _ in done.state.curve] and len(points) == 8
    assert "tensorboard --logdir" in capsys.readouterr().err


def quantised(kind: str, family: str, tiny_model: Callable[..., Path], folder: Path) -> Path:
    """Every layer in 4 bits, or a GGUF file of 8."""
    if kind == "gguf":
        return convert(tiny_model(family), folder / "base.gguf", gguf.GGMLQuantizationType.Q8_0)
    original, form = open_checkpoint(tiny_model(family)), target("compressed-tensors")
    plan = [name for name, info in original.tensors.items() if "int4-g64" in form.codecs(original, name, tuple(info.shape))]
    return form.write(original, {name: nearest(original.read(name).float(), codecs.get("int4-g64")) for name in plan},
                      folder / "base")


def bytes_of(base: Path) -> dict[str, str]:
    files = sorted(base.rglob("*")) if base.is_dir() else [base]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


@pytest.mark.parametrize("way", ["lora", "qlora"])
@pytest.mark.parametrize(("kind", "family"), [("compressed-tensors", "bert"), ("compressed-tensors", "llama"),
                                              ("gguf", "llama")])
def test_an_adapter_on_a_quantised_base_is_all_that_is_trained(way: str, kind: str, family: str,
                                                               tiny_model: Callable[..., Path], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base as it is decoded every adapted layer moves by a matrix of rank 2 at most, and nothing else moves."""
    base = quantised(kind, family, tiny_model, tmp_path)
    stood, opened = bytes_of(base), open_checkpoint(base)
    decoded = {name: opened.read(name).float() for name in opened.tensors}
    original = open_checkpoint(tiny_model(family))
    assert any(not torch.equal(value, original.read(name).float()) for name, value in decoded.items())
    path = tuning(tmp_path, base, way, epochs=2, checkpoint_every=4, lstm=False)
    changes = [f"way={{name: {way}, rank: 2}}"]
    done = tune(path, tmp_path, tmp_path / "whole", changes=changes)
    assert bytes_of(base) == stood and 0 < done.trained < done.parameters / 5
    tuned = load_file(tmp_path / "whole" / "model.safetensors")
    moved, kept = 0, 0
    for name, value in tuned.items():
        if name not in decoded or "pooler" in name:
            continue  # the head, which is new
        change = value - decoded[name]
        if value.ndim == 2 and "embed" not in name:
            sizes = torch.linalg.svdvals(change)
            assert sizes[0] > 1e-3 > 100 * sizes[2], name
            moved += 1
        else:
            assert not change.any(), name
            kept += 1
    assert moved == 2 * (6 if family == "bert" else 7) and kept > 4
    before = Watch.on_step_end

    def killed(self: Watch, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == 6:
            raise KeyboardInterrupt
        return before(self, args, state, control, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Watch, "on_step_end", killed)
        tune(path, tmp_path, tmp_path / "cut", changes=changes)
    adapter = load_file(tmp_path / "cut.work" / "checkpoint-4" / "adapter.safetensors")
    assert all("lora_" in name or "classifier" in name or "score" in name or "pooler" in name for name in adapter)
    tune(path, tmp_path, tmp_path / "cut", changes=changes)
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    assert cut.keys() == tuned.keys() and all(torch.equal(value, cut[name]) for name, value in tuned.items())
    assert bytes_of(base) == stood
