"""What watches a run: the guards against broken steps, the curve, the bar, the signals that stop it, the checkpoints.

A step is skipped (its gradients are dropped, the optimiser does not move) when its loss or a gradient is not finite, or
when its loss lies `spike` robust deviations and one nat above the median of the last WINDOW losses:

    loss > median + max(1, spike x 1.4826 MAD)

PATIENCE skipped steps in a row end the run with the cause and a remedy. Loss, tokens and the wish to stop are summed over
the processes before anything is decided, so all of them decide alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch import distributed as dist
from transformers import TrainerCallback

from ..errors import SupremumError
from ..progress import console, note
from ..workspace import write_atomic
from .checkpoints import seal
from .recipe import Training

WINDOW, WARM, PATIENCE = 100, 20, 10  # losses remembered; needed before a spike is called; skipped steps in a row
NAMED = 20  # skipped steps that are told one by one
STATE = "run.json"


@dataclass
class State:
    """What a checkpoint keeps of the watch."""

    recent: list[float] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)  # [step, mean loss since the last point, learning rate]
    gathered: list[float] = field(default_factory=list)  # [sum, steps] since the last point
    skipped: list[list[Any]] = field(default_factory=list)  # [step, why]
    in_a_row: int = 0
    tokens: int = 0
    seconds: float = 0.0
    joules: float = 0.0

    @property
    def loss(self) -> float | None:
        """The curve's last."""
        return self.curve[-1][1] if self.curve else None


class Watch(TrainerCallback):
    """Fed by the trainer with every batch's loss and tokens; acts at the step's end. at_peak: tokens/s if every operation ran
    at the machine's peak rate, which MFU is a share of; 0 where it was not measured."""

    def __init__(self, recipe: Training, run: Path, steps: int, state: State, at_peak: float = 0.0) -> None:
        self.recipe, self.run, self.steps, self.state, self.at_peak = recipe, run, steps, state, at_peak
        self.loss, self.tokens, self.stop, self.scaled = 0.0, 0, False, False
        self.stopped = False  # by a signal, all processes agreeing
        self._started = self._before = 0.0
        self._energy = _joules()
        self._bar: Progress | None = None
        self._last_line = 0.0

    def add(self, loss: Tensor, tokens: int) -> None:
        self.loss += float(loss)
        self.tokens += tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started, self._before = time.perf_counter(), self.state.seconds
        self._from_tokens, self._from_step = self.state.tokens, state.global_step
        if state.is_world_process_zero and console.is_terminal:
            self._bar = Progress(TextColumn("train"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[now]}"),
                                 TextColumn("left"), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("train", total=self.steps, completed=state.global_step, now="")
            self._bar.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """All gradients of the step are there: decide whether it is made."""
        assert model is not None
        loss, tokens, stop = _summed([self.loss / args.world_size, self.tokens, float(self.stop)], args.device)
        self.loss, self.tokens, self.stop = 0.0, 0, bool(stop)
        self.state.tokens += int(tokens)
        why = self._broken(loss, model)
        if why:
            for parameter in model.parameters():
                parameter.grad = None
            self._skip(state.global_step + 1, why, loss)
            return
        self.state.in_a_row = 0
        self.state.recent = [*self.state.recent[-WINDOW + 1:], loss]
        total, count = self.state.gathered or (0.0, 0)
        self.state.gathered = [total + loss, count + 1]

    def _broken(self, loss: float, model: nn.Module) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not math.isfinite(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)):
            return "a gradient is not finite"
        if self.recipe.spike and len(self.state.recent) >= WARM:
            middle = statistics.median(self.state.recent)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in self.state.recent)
            if loss > middle + max(1.0, self.recipe.spike * spread):
                return f"its loss of {loss:.3f} stands out from the median of {middle:.3f}"
        return ""

    def _skip(self, step: int, why: str, loss: float) -> None:
        if self.scaled and math.isfinite(loss):
            return  # the fp16 scaler is looking for its scale, and skips by itself
        self.state.skipped.append([step, why])
        self.state.in_a_row += 1
        if len(self.state.skipped) <= NAMED:
            note(f"step {step} is skipped: {why}.")
        if self.state.in_a_row >= PATIENCE:
            self.finish()
            spikes = why.startswith("its loss of")
            raise SupremumError(
                f"Steps {step - PATIENCE + 1} to {step} were all skipped; of the last, {why}.",
                ("If the data changed for good, raise spike (0 is off). Otherwise lower" if spikes else "Lower") +
                " optimiser.lr, raise schedule.warmup, or use precision: bf16 or fp32; the last checkpoint is kept, "
                "and --fresh begins again with the new recipe.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kept: Any) -> Any:
        step = state.global_step
        if step % self.recipe.log_every == 0 or step == self.steps:
            total, count = self.state.gathered or (0.0, 0)
            if count:
                self.state.curve.append([step, total / count, kept["optimizer"].param_groups[0]["lr"]])
            self.state.gathered = []
        if state.is_world_process_zero:
            self._show(step)
        if self.stop and step < self.steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control

    def _show(self, step: int) -> None:
        spent = time.perf_counter() - self._started
        rate = (self.state.tokens - self._from_tokens) / max(spent, 1e-9)
        share = f"  MFU {rate / self.at_peak:.0%}" if self.at_peak else ""
        now = f"loss {self.state.recent[-1]:.3f}  {rate:,.0f} tokens/s{share}" if self.state.recent else ""
        if self._bar:
            self._bar.update(self._task, completed=step, now=now)
        elif spent - self._last_line > 15:
            self._last_line = spent
            left = spent / (step - self._from_step) * (self.steps - step) / 60
            print(f"train {step}/{self.steps}  {now}  {left:.1f} minutes left", file=sys.stderr, flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The trainer has written RUN/.part/checkpoint-N, every process its part: make it whole and move it into place."""
        _barrier()
        if state.is_world_process_zero:
            self.clock()
            part = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_atomic(part / STATE, json.dumps(asdict(self.state)).encode())
            seal(part, self.run)
        _barrier()

    def clock(self) -> None:
        """Bring seconds and joules up to now."""
        now = time.perf_counter()
        self.state.seconds = self._before + now - self._started
        energy = _joules()
        self.state.joules += max(0.0, energy - self._energy)  # the counter wraps now and then: that piece is lost
        self._energy = energy

    def finish(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    @contextlib.contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint; a second one ends it at once."""
        def handle(number: int, frame: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            note("stopping after this step; once more stops at once.")

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals belong to it
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.finish()


def _summed(values: list[float], device: torch.device) -> list[float]:
    """The sum over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _joules() -> float:
    """Energy counted by the processor packages so far (Linux powercap); 0 where it cannot be read."""
    total = 0
    for file in Path("/sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"):
        with contextlib.suppress(OSError, ValueError):
            total += int(file.read_text())
    return total / 1e6
