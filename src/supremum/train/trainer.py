"""One training run over Transformers' Trainer: sections of a recipe become its arguments; what it lacks is added.

    learning rate at step s of S:  rise linearly to lr over warmup x S, then
        linear   1 -> floor          cosine   floor + (1 - floor)(1 + cos(pi t))/2          constant   1
        wsd      1 until the last decay x S steps, which fall linearly to floor (Hu et al. 2024, arXiv:2404.06395)

Added: a data order and masks that are functions of seed and draw (`examples`), guards, curve and signals (`watch`), whole
checkpoints (`checkpoints`). The same command goes on from the newest whole checkpoint: weights, optimiser, schedule and
random states are restored, so on one process the result is that of an uninterrupted run to the bit. States of optimisers
are read with torch.load(weights_only=True), which builds tensors and plain values alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import SupremumError
from ..progress import note
from ..workspace import Workspace
from .checkpoints import PART, newest_whole, step_of
from .examples import Drawn, Transform
from .recipe import Optimiser, Schedule, Training
from .watch import STATE, State, Watch
from .ways import adapter_state, restore_adapter

Loss = Callable[..., Tensor]  # (outputs, labels, num_items_in_batch) -> scalar
ADAPTER = "adapter.safetensors"  # in a checkpoint, in place of the model's weights
_CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing")  # renamed within Transformers 5
                      if name in TrainingArguments.__dataclass_fields__)
UNUSED = {"adafactor": ("betas", "epsilon"), "sgd": ("epsilon",)}  # keys that an optimiser does not take
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # log_to: what must be installed


class Trainer(transformers.Trainer):
    """Transformers' Trainer on a fixed order of examples, telling every batch to a `Watch`."""

    watch: Watch
    schedule: Schedule

    def get_train_dataloader(self) -> DataLoader[Any]:
        examples: Any = self.train_dataset
        return self.accelerator.prepare(DataLoader(
            examples, batch_size=self.args.per_device_train_batch_size, collate_fn=self.data_collator,
            shuffle=False, drop_last=True, pin_memory=self.args.device.type == "cuda"))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            shape, moved = self.schedule, optimizer or self.optimizer
            assert moved is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                moved, lambda step: rate(shape, step, num_training_steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if (state := adapter_state(self.model)) is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or "")
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if (file := Path(resume_from_checkpoint) / ADAPTER).exists():
            restore_adapter(self.model, load_file(file))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        tokens = tokens_in(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.add(loss, tokens)
        return loss


@dataclass(frozen=True)
class Fitted:
    """A finished run."""

    trainer: Trainer
    steps: int
    state: State
    resumed_from: int  # step; 0 for a run that began here

    @property
    def tokens_per_second(self) -> float:
        return self.state.tokens / self.state.seconds if self.state.seconds else 0.0


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the learning rate at `step` (from 0) of `steps`."""
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    floor = schedule.floor
    through = min(1.0, (step - warm) / max(1, steps - warm))
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * through)) / 2
    if schedule.name == "wsd":
        fall = max(1, min(steps - warm, round(schedule.decay * steps)))
        through = min(1.0, max(0.0, (step - (steps - fall)) / fall))
    return 1 - (1 - floor) * through


def optimiser(settings: Optimiser) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """(class, arguments) as the Trainer takes them."""
    if settings.name == "sgd":
        return torch.optim.SGD, {"lr": settings.lr, "momentum": settings.betas[0]}
    if settings.name == "adafactor":
        from transformers import Adafactor

        return Adafactor, {"lr": settings.lr, "relative_step": False, "scale_parameter": False, "warmup_init": False}
    return torch.optim.AdamW, {"lr": settings.lr, "betas": settings.betas, "eps": settings.epsilon}


def tokens_in(inputs: dict[str, Any]) -> int:
    """Tokens that the model reads, padding left out; of batches in batches, of all of them."""
    total = sum(tokens_in(part) for part in inputs.values() if isinstance(part, dict))
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if isinstance(inputs.get(mask), Tensor):
            total += int(inputs[mask].sum())
        elif isinstance(inputs.get(ids), Tensor):
            total += inputs[ids].numel()
    return total


def world() -> tuple[int, int]:
    """(rank, processes) as torchrun and accelerate launch say it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_alone() -> None:
    """Refuse to tune in several processes."""
    if world()[1] > 1:
        raise SupremumError(f"tune runs in one process, this is one of {world()[1]}.",
                            "Start it without torchrun. `supremum train` runs in several.")


def open_run(folder: Path, inputs: dict[str, Any], *, fresh: bool) -> Workspace | None:
    """The locked state of the run; the first process alone holds it, since the others write beside it at its word."""
    return Workspace(folder, inputs, fresh=fresh) if world()[0] == 0 else None


def fit(
    model: Any, examples: Sequence[Any], recipe: Training, run: Path, *, collator: Callable[[list[Any]], dict[str, Any]],
    transform: Transform | None = None, loss: Loss | None = None, callbacks: Sequence[TrainerCallback] = (),
    optimiser_factory: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None, kind: type[Trainer] = Trainer,
    at_peak: float = 0.0, **arguments: Any,
) -> Fitted:
    """Train `model` in place, or go on with the run that `run` holds (a folder that `open_run` opened).

    examples: a sequence; transform: what is random about one, from its own generator; loss: instead of the model's own;
    kind: a subclass with another `compute_loss`; at_peak: as in `Watch`; arguments: passed on to TrainingArguments. Raises
    KeyboardInterrupt after a signal, with a checkpoint written; SupremumError for what the user can mend.
    """
    if not len(examples):
        raise SupremumError("There are no training examples.", "Give more text, or a shorter length.")
    steps, processes = recipe.total_steps(len(examples)), world()[1]
    check(recipe, processes)
    if recipe.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise SupremumError(f"gradient_checkpointing: Transformers cannot compute blocks of a {_plain_name(model)} again.",
                            "Leave it out; lower batch and raise accumulation by the same factor to save memory.")
    transformers.utils.logging.disable_progress_bar()  # of writing checkpoints
    with _plain_failures(run, recipe.log_to):
        settings = TrainingArguments(**(_arguments(recipe, run, steps, processes) | arguments))
        found = _agreed(newest_whole(run) if settings.process_index == 0 else None, processes)
        state = State(**json.loads((found / STATE).read_text())) if found else State()
        watch = Watch(recipe, run, steps, state, at_peak)
        drawn = Drawn(examples, steps * recipe.batch * recipe.accumulation, recipe.seed, transform)
        trainer = kind(model=model, args=settings, train_dataset=drawn, data_collator=collator, compute_loss_func=loss,
                       callbacks=[watch, *_tensorboard(recipe, run, found), *callbacks],
                       optimizer_cls_and_kwargs=optimiser_factory or optimiser(recipe.optimiser))
        for unwanted in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(unwanted)
        trainer.watch, trainer.schedule = watch, recipe.schedule
        watch.scaled = trainer.accelerator.scaler is not None
        if found and settings.process_index == 0:
            note(f"goes on from {found}.")
        with watch.stopping_on_signals():
            trainer.train(resume_from_checkpoint=str(found) if found else None)
    watch.clock()
    if watch.stopped:
        raise KeyboardInterrupt
    return Fitted(trainer, steps, state, step_of(found))


def check(recipe: Training, processes: int = 1) -> None:
    """Refuse before anything is read what this machine, this launch or the recipe's optimiser cannot do."""
    gpu = torch.cuda.is_available()
    if recipe.precision == "fp16" and not gpu:
        raise SupremumError("precision: fp16 needs a GPU; this machine has none.", "Use precision: bf16 or fp32.")
    if recipe.precision == "tf32" and not (gpu and torch.cuda.get_device_capability()[0] >= 8):
        raise SupremumError("precision: tf32 needs an NVIDIA GPU from Ampere on.", "Use precision: fp32.")
    if recipe.batch % processes:
        raise SupremumError(f"batch: {recipe.batch} does not divide by {processes} processes.",
                            f"Use --set batch={math.ceil(recipe.batch / processes) * processes}.")
    if recipe.fsdp and processes == 1:
        raise SupremumError("fsdp: true shards over several processes; this is one.",
                            "Start `train` with torchrun --nproc-per-node N -m supremum train ...; leave fsdp out of `tune`.")
    if recipe.compile and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))):
        raise SupremumError("compile: torch.compile needs a C++ compiler; none is found.", "Install g++, or leave it out.")
    for key in UNUSED.get(recipe.optimiser.name, ()):
        if getattr(recipe.optimiser, key) != getattr(type(recipe.optimiser)(), key):
            raise SupremumError(f"optimiser.{key}: {recipe.optimiser.name} has none.", f"Leave optimiser.{key} out.")
    if recipe.log_to != "none" and not find_spec(TRACKERS[recipe.log_to]):
        raise SupremumError(f"log_to: {recipe.log_to} is not installed.", f"pip install 'supremum[{recipe.log_to}]'")


def _arguments(recipe: Training, run: Path, steps: int, processes: int) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(run / PART), "max_steps": steps, "per_device_train_batch_size": recipe.batch // processes,
        "gradient_accumulation_steps": recipe.accumulation, "max_grad_norm": recipe.clip, "seed": recipe.seed,
        "learning_rate": recipe.optimiser.lr, "weight_decay": recipe.optimiser.weight_decay, "lr_scheduler_type": "constant",
        "bf16": recipe.precision == "bf16", "fp16": recipe.precision == "fp16", "torch_compile": recipe.compile,
        _CHECKPOINTING: recipe.gradient_checkpointing, "save_strategy": "steps", "save_total_limit": None,
        "save_steps": recipe.checkpoint_every, "logging_strategy": "no" if recipe.log_to == "none" else "steps",
        "logging_steps": recipe.log_every, "report_to": "none" if recipe.log_to == "tensorboard" else recipe.log_to,
        "disable_tqdm": True, "remove_unused_columns": False,
        "use_cpu": not gpu, "ddp_backend": None if gpu or processes == 1 else "gloo", "ddp_find_unused_parameters": False,
        "dataloader_num_workers": 0,
    } | ({"tf32": recipe.precision == "tf32"} if gpu else {}) | ({"fsdp": True} if recipe.fsdp else {})


def _tensorboard(recipe: Training, run: Path, found: Path | None) -> list[TrainerCallback]:
    """What writes the curves into OUT.tensorboard beside OUT, or TENSORBOARD_LOGGING_DIR. Left alone it would write into
    `run`, which goes with the run. Events of steps that come again after `found` are marked as void."""
    if recipe.log_to != "tensorboard" or world()[0] != 0:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(run.with_name(f"{run.name.removesuffix('.work')}.tensorboard"))
    note(f"curves: tensorboard --logdir {folder}")
    return [TensorBoardCallback(SummaryWriter(folder, purge_step=step_of(found) + 1, flush_secs=10))]


def _plain_name(model: Any) -> str:
    """The class of the model, an adapter's base unwrapped."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _agreed(found: Path | None, processes: int) -> Path | None:
    """What the first process found, in all of them."""
    if processes == 1:
        return found
    shared = [str(found) if found else None]
    dist.broadcast_object_list(shared)
    return Path(shared[0]) if shared[0] else None


@contextlib.contextmanager
def _plain_failures(run: Path, tracker: str) -> Iterator[None]:
    """Failures of the machine and of the tracker as causes and remedies."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SupremumError("The GPU ran out of memory.", "Lower batch and raise accumulation by the same factor, or use "
                            "gradient_checkpointing: true.") from error
    except RuntimeError as error:
        text = str(error).lower()
        if "can't allocate memory" in text or "not enough memory" in text:
            raise SupremumError("The machine ran out of memory.", "Lower batch and raise accumulation by the same factor, or "
                                "use gradient_checkpointing: true.") from error
        if world()[1] > 1 and any(word in text for word in ("gloo", "nccl", "connection", "peer", "timed out", "socket")):
            rank, processes = world()
            raise SupremumError(f"Another process of this run died or cannot be reached (process {rank} of {processes} "
                                f"noticed).", f"Start the same command again: it goes on from the newest checkpoint in {run}."
                                ) from error
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] != tracker:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SupremumError(f"log_to: {tracker} fails ({first}).", "Set it up as its documentation says "
                            "(MLFLOW_TRACKING_URI, WANDB_MODE=offline), or leave log_to out.") from error
