"""Several tasks over one trunk: a step takes a batch of each, and the loss is their weighted mean.

    L = sum_k w_k L_k(head_k(trunk(x_k))) / sum_k w_k                        hard sharing, Caruana 1997

Every task has a model of its own whose trunk's modules are those of the first; heads and poolers are its own. A way changes
the trunk once, in place, so all of them see its adapters. At the end each is a whole plain model: OUT/NAME/ opens anywhere
and has the tune.json that it would have if it had been tuned alone, so `optimize --floor` takes it, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import __version__
from ..errors import SupremumError
from ..plain import plain
from ..progress import phase
from ..workspace import replacing_folder
from .base import load as load_base
from .recipe import limits
from .recipe import load as load_recipe
from .result import check_out, put_document, standing
from .sections import Common, Data, TaskSection, Tune, settings_of
from .tasks import Task, make
from .trainer import Trainer, check_alone, fit, open_run
from .tune import FILE, Tuned, check_before, digests, leaks, learnt_by, put, splits, table
from .watch import State
from .ways import counts, merged, prepare, trunk


@dataclass(frozen=True)
class Part:
    """One of the tasks. weight: of its loss."""

    task: TaskSection
    data: Data
    weight: float = limits(1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class Several(Common):
    tasks: dict[str, Part]

    def alone(self, name: str) -> Tune:
        """The recipe of one of the tasks."""
        part = self.tasks[name]
        return Tune(task=part.task, data=part.data, **{field.name: getattr(self, field.name) for field in fields(Common)})


class Together(nn.Module):
    """The models as one, the trunk's parameters once and every head's. forward: a batch of each task in, the loss out."""

    def __init__(self, models: Sequence[Any], tasks: Sequence[Task], names: Sequence[str], weights: Sequence[float]) -> None:
        super().__init__()
        self.first = models[0]
        self.heads = nn.ModuleList(nn.ModuleList(own(model)) for model in models[1:])
        self._models = list(zip(names, models, tasks, weights, strict=True))  # a list: its modules are not registered again

    def forward(self, batches: dict[str, dict[str, Any]]) -> Tensor:
        found = [weight * task.loss(model, dict(batches[name])) for name, model, task, weight in self._models]
        return sum(found[1:], found[0]) / sum(weight for *_, weight in self._models)

    @property
    def supports_gradient_checkpointing(self) -> bool:
        return all(model.supports_gradient_checkpointing for _, model, *_ in self._models)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        for _, model, *_ in self._models:
            model.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same in releases of Transformers before it was renamed."""
        for _, model, *_ in self._models:
            model.gradient_checkpointing_enable(**options)

    def train(self, mode: bool = True) -> Together:
        super().train(mode)
        for _, model, *_ in self._models:
            model.train(mode)
        return self

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Tied weights once: safetensors stores no tensor twice."""
        found, seen = super().state_dict(*arguments, **options), set()
        for name in list(found):
            place = found[name].data_ptr(), found[name].shape
            if found[name].numel() and place in seen:
                del found[name]
            seen.add(place)
        return found


def own(model: Any) -> list[nn.Module]:
    """What a task's model does not share: all beside the trunk, and the pooler."""
    base = trunk(model)
    pooler = getattr(base, "pooler", None)
    return [part for part in model.children() if part is not base] + ([pooler] if pooler is not None else [])


def share(models: Sequence[Any], names: Sequence[str]) -> None:
    """Make the trunks' modules those of the first model's."""
    base = trunk(models[0])
    for name, model in zip(names, models, strict=True):
        other = trunk(model)
        if other is model or type(other) is not type(base):
            raise SupremumError(f"tasks: {names[0]} and {name} have no trunk in common in this model.",
                                "Tune them apart, or choose another base model.")
        for part, _ in list(other.named_children()):
            if part != "pooler" and getattr(base, part, None) is not None:
                setattr(other, part, getattr(base, part))
        model.tie_weights()


def rows_of_each(features: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every example of the longest task once, those of the others repeated."""
    return [{name: found[place % len(found)] for name, found in features.items()}
            for place in range(max(map(len, features.values())))]


def tune_several(path: str | Path, data: str | Path = ".", out: str | Path | None = None, *, changes: Sequence[str] = (),
                 fresh: bool = False) -> dict[str, Tuned]:
    """Tune as a recipe with `tasks` says; a folder for each below `out`. The rest as for `tune`."""
    recipe = load_recipe(path, Several, changes)
    folder, out = Path(data), Path(out) if out else Path(Path(path).stem)
    check_alone()
    check_out(out, FILE)
    names = list(recipe.tasks)
    if len(names) < 2 or not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) for name in names):
        raise SupremumError(f"{path}: tasks: {', '.join(names) or 'nothing'}.",
                            "Give two tasks or more, named with letters, digits, - and _.")
    if recipe.way.name in ("adalora", "prompt"):
        raise SupremumError(f"{path}: way: {recipe.way.name} is for one task alone.",
                            "Use full, frozen, gradual, lora, qlora or ia3.")
    if not isinstance(recipe.model, str):
        raise SupremumError(f"{path}: model: several tasks need a base, not a model from scratch.", "Name a model.")
    base = recipe.model
    tasks = {name: make(part.task.name, settings_of(part.task), f"{path}: tasks.{name}")
             for name, part in recipe.tasks.items()}
    for name, task in tasks.items():
        check_before(recipe.alone(name), task, f"{path}: tasks.{name}")
    with phase("read rows"):
        rows = {name: splits(task, recipe.alone(name), folder) for name, task in tasks.items()}
    learnt = set().union(*(learnt_by(task, rows[name][0]) for name, task in tasks.items()))  # the trunk sees all
    leaked = {name: leaks(task, learnt, valid=rows[name][1], test=rows[name][2]) for name, task in tasks.items()}
    loaded = {name: load_base(base, task, recipe.seed, quantised=recipe.way.name == "qlora") for name, task in tasks.items()}
    models, tokenizer = [model for model, *_ in loaded.values()], loaded[names[0]][1]
    inputs = {"supremum": __version__, "recipe": plain(recipe), "model": loaded[names[0]][2],
              "rows": {name: digests(train=train, valid=valid, test=test) for name, (train, valid, test) in rows.items()}}
    work = out.with_name(f"{out.name}.work")
    if found := standing(out, FILE, inputs, fresh=fresh):
        return {name: Tuned.from_dict(one) for name, one in found["tasks"].items()}
    run = open_run(work, inputs, fresh=fresh)
    share(models, names)
    minutes, steps, state, together = 0.0, 0, State(), None
    if recipe.epochs != 0:
        with phase("tokens"):
            features = rows_of_each({name: task.encode(rows[name][0], tokenizer) for name, task in tasks.items()})
        steps = recipe.total_steps(len(features))
        models[0], callbacks = prepare(models[0], recipe.way, steps)
        if recipe.way.name not in ("full", "gradual"):
            for model, task in zip(models[1:], list(tasks.values())[1:], strict=True):
                for part in own(model):
                    part.requires_grad_(task.new_head)
        together = Together(models, list(tasks.values()), names, [part.weight for part in recipe.tasks.values()])
        started = time.perf_counter()
        fitted = fit(together, features, recipe, work, collator=_collate(tasks, tokenizer), callbacks=callbacks,
                     kind=_Trainer)
        state = fitted.state
        minutes = max(state.seconds, time.perf_counter() - started) / 60
    trained, total = counts(together) if together is not None else (0, counts(nn.ModuleList(models))[1])
    models[0] = merged(models[0])
    done = {}
    for model, (name, task) in zip(models, tasks.items(), strict=True):
        train, valid, test = rows[name]
        with phase(f"score {name}"):
            said = task.predict(model.eval(), tokenizer, test, recipe.score_batch)
            lines = table(task, train, test, said, None, recipe.seed, valid if recipe.lstm else None)
            held = task.score(task.truth(valid), task.predict(model, tokenizer, valid, recipe.score_batch))
        done[name] = Tuned(recipe=str(path), task=task.name, metric=task.metric, model=base, way=recipe.way.name,
                           lines=lines, rows={"train": len(train), "valid": len(valid), "test": len(test)},
                           leaks=leaked[name], labels=task.labels, trained=trained, parameters=total, steps=steps,
                           minutes=minutes, loss=state.loss, curve=state.curve,
                           skipped=state.skipped,
                           valid=float(held[task.metric]), path=str(out / name), data=str(folder.resolve()))
    with replacing_folder(out) as staging:
        for model, (name, one) in zip(models, done.items(), strict=True):
            (staging / name).mkdir()
            put(model, tokenizer, one, inputs | {"recipe": plain(recipe.alone(name))}, staging / name)
        put_document(staging, FILE, {"tasks": done, "inputs": inputs})
    if run is not None:
        run.discard()
    return done


class _Trainer(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:
        return model(inputs)


def _collate(tasks: Mapping[str, Task], tokenizer: Any) -> Callable[[list[Any]], dict[str, Any]]:
    each = {name: task.collate(tokenizer) for name, task in tasks.items()}
    return lambda rows: {name: dict(collate([row[name] for row in rows])) for name, collate in each.items()}
