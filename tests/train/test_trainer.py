"""A run: its rates, its order, that a resumed one ends as an uninterrupted one to the bit, and what it does when hurt."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from supremum.errors import StateError, SupremumError
from supremum.train.checkpoints import checkpoints, damage, newest_whole
from supremum.train.examples import Drawn
from supremum.train.recipe import Optimiser, Schedule, Training
from supremum.train.trainer import Fitted, fit, open_run, rate

VOCABULARY, LENGTH = 50, 12


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH))


def recipe(**changes: Any) -> Training:
    return Training(**({"steps": 8, "batch": 4, "accumulation": 2, "checkpoint_every": 3, "log_every": 2} | changes))


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.stack(rows))
    return {"input_ids": ids, "labels": ids.clone()}


def noisy(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(len(row)) < 0.2, rng.integers(0, VOCABULARY, len(row)), row)


class At(TrainerCallback):
    """Calls something at the end, or the beginning, of one step."""

    def __init__(self, step: int, what: Callable[..., None]) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kept: Any) -> None:
        if state.global_step == self.step:
            self.what(**kept)


def run(folder: Path, wanted: Training, *callbacks: TrainerCallback, trained: Any = None, **options: Any) -> Fitted:
    state = open_run(folder, {"test": 1}, fresh=False)
    rows = [np.random.default_rng(i).integers(0, VOCABULARY, LENGTH) for i in range(30)]
    try:
        return fit(trained if trained is not None else model(), rows, wanted, folder, collator=collate, transform=noisy,
                   callbacks=callbacks, **options)
    finally:
        if state:
            state.close()


def weights(fitted: Fitted) -> list[torch.Tensor]:
    return [p.detach().clone() for p in fitted.trainer.model.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "at", "share"), [
    ("linear", 10, 1.0), ("linear", 55, 0.55), ("linear", 100, 0.1), ("cosine", 55, 0.55), ("cosine", 100, 0.1),
    ("wsd", 79, 1.0), ("wsd", 90, 0.55), ("wsd", 100, 0.1), ("constant", 99, 1.0), ("cosine", 4, 5 / 11),
])
def test_rates_are_their_formulas(name: Any, at: int, share: float) -> None:
    assert rate(Schedule(name=name, warmup=0.1, decay=0.2, floor=0.1), at, 100) == pytest.approx(share)


def test_order_is_every_example_once_an_epoch_and_another_each_epoch() -> None:
    drawn = Drawn(list(range(7)), 21, seed=5)
    epochs = [[drawn[i] for i in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Drawn(list(range(7)), 21, seed=5)[20] == drawn[20]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "adafactor"])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, optimiser: Any) -> None:
    wanted = recipe(optimiser=Optimiser(name=optimiser, lr=1e-2))  # GPT-2's default dropout of 0.1 draws from torch's state
    whole = run(tmp_path / "whole", wanted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", wanted, At(5, lambda **_: os.kill(os.getpid(), signal.SIGINT)))
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["checkpoint-6", "checkpoint-3"]
    resumed = run(tmp_path / "cut", wanted)
    assert resumed.resumed_from == 6
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert whole.state.curve == resumed.state.curve and whole.state.tokens == resumed.state.tokens == 8 * 8 * LENGTH
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), model().parameters(), strict=True))


def test_a_damaged_checkpoint_is_passed_over_and_a_half_written_one_removed(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(**_: Any) -> None:
        raise Killed

    whole = run(tmp_path / "whole", recipe())
    with pytest.raises(Killed):
        run(tmp_path / "cut", recipe(), At(7, kill))
    newest, older = checkpoints(tmp_path / "cut")
    with (newest / "optimizer.pt").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff" * 4)
    assert damage(newest) == "optimizer.pt is damaged" and not damage(older)
    half = tmp_path / "cut" / ".part" / "checkpoint-7"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    resumed = run(tmp_path / "cut", recipe())
    assert resumed.resumed_from == 3 and not half.exists()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SupremumError, match="none is whole"):
        newest_whole(tmp_path)


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    def still() -> GPT2LMHeadModel:
        made = model()
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return made

    one = run(tmp_path / "one", recipe(batch=8, accumulation=1), trained=still())
    two = run(tmp_path / "two", recipe(batch=2, accumulation=4), trained=still())
    for (_, a, _), (_, b, _) in zip(one.state.curve, two.state.curve, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_a_broken_step_is_skipped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = {"n": 0}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls["n"] += 1
        value = outputs.logits.float().square().mean()
        return value * (math.nan if calls["n"] == 3 else 1.0)

    fitted = run(tmp_path / "r", recipe(accumulation=1, steps=6), loss=loss)
    assert fitted.state.skipped == [[3, "the loss is nan"]]
    assert "step 3 is skipped: the loss is nan" in capsys.readouterr().err
    assert all(torch.isfinite(w).all() for w in weights(fitted))


def test_the_progress_tells_the_share_of_the_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 20)
    monkeypatch.setattr("supremum.train.watch.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run(tmp_path / "r", recipe(accumulation=1, steps=3), at_peak=2.0)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train ")]
    assert lines
    for line in lines:
        found = re.search(r"([\d,]+) tokens/s  MFU (\d+)%", line)
        assert found and int(found[2]) == pytest.approx(50 * int(found[1].replace(",", "")), abs=26)
    run(tmp_path / "s", recipe(accumulation=1, steps=3))
    assert "MFU" not in capsys.readouterr().err


def test_a_spike_is_skipped(tmp_path: Path) -> None:
    calls = {"n": 0}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls["n"] += 1
        return outputs.logits.float().square().mean() + (50.0 if calls["n"] == 25 else 0.0)

    fitted = run(tmp_path / "r", recipe(accumulation=1, steps=26, checkpoint_every=100), loss=loss)
    assert [step for step, _ in fitted.state.skipped] == [25] and "stands out" in fitted.state.skipped[0][1]
    calls["n"] = 0
    off = run(tmp_path / "off", recipe(accumulation=1, steps=26, checkpoint_every=100, spike=0.0), loss=loss)
    assert not off.state.skipped


def test_steps_that_stay_broken_end_the_run_with_a_remedy(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.mean() * math.inf

    with pytest.raises(SupremumError, match=r"Steps 1 to 10 were all skipped.*Lower optimiser.lr"):
        run(tmp_path / "r", recipe(accumulation=1, steps=30), loss=loss)


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    held = open_run(tmp_path / "r", {"a": 1}, fresh=False)
    assert held
    with pytest.raises(StateError, match="another run"):
        open_run(tmp_path / "r", {"a": 1}, fresh=False)
    held.close()
    with pytest.raises(StateError, match="a was 1, is 2"):
        open_run(tmp_path / "r", {"a": 2}, fresh=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine without a GPU")
@pytest.mark.parametrize(("changes", "says"), [({"precision": "fp16"}, "needs a GPU"), ({"precision": "tf32"}, "Ampere"),
                                               ({"fsdp": True}, "several processes"),
                                               ({"optimiser": Optimiser("adafactor", betas=(0.8, 0.9))}, "betas: adafactor"),
                                               ({"optimiser": Optimiser("sgd", epsilon=1e-6)}, "epsilon: sgd")])
def test_what_this_machine_cannot_do_is_refused_first(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SupremumError, match=says):
        run(tmp_path / "r", recipe(**changes))
