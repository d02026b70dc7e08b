"""Recipes: a YAML file in, frozen data classes out; what is not understood is refused by file, line and key.

    recipe = load("recipe.yaml", Training, ["optimiser.lr=1e-4"])      Training, or a data class that extends it

Data classes are the schema: a field's type is what its value must be, `limits` its range, a nested data class a section.
Loaded with PyYAML's safe loader, which builds nothing but numbers, strings, lists and mappings. Paths in a recipe are
relative to --data DIR, so that one recipe serves any copy of the data.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ..errors import SupremumError

R = TypeVar("R")
MOST_BYTES = 1 << 20  # a recipe is written by hand; a larger file is something else
VERBS = {"text": "train", "packed": "train", "objective": "train", "task": "tune", "tasks": "tune", "way": "tune"}  # by key


def limits(default: Any, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Any:
    """A field with a range: least <= value <= most, value > above."""
    return field(default=default, metadata={"least": least, "most": most, "above": above})


@dataclass(frozen=True)
class Optimiser:
    name: Literal["adamw", "sgd", "adafactor"] = "adamw"  # adafactor keeps row and column means instead of second moments
    lr: float = limits(1e-3, above=0)
    weight_decay: float = limits(0.1, least=0)  # of matrices; biases and norms are not decayed
    betas: tuple[float, float] = limits((0.9, 0.95), least=0, most=0.999999)  # sgd takes the first as its momentum
    epsilon: float = limits(1e-8, above=0)


@dataclass(frozen=True)
class Schedule:
    name: Literal["linear", "cosine", "wsd", "constant"] = "cosine"
    warmup: float = limits(0.02, least=0, most=1)  # share of the steps over which the rate rises from 0
    decay: float = limits(0.2, above=0, most=1)  # wsd: share of the steps, at the end, over which it falls
    floor: float = limits(0.0, least=0, most=1)  # share of `lr` that it falls to


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every training run has. One of `steps` and `epochs` is given. `batch` counts examples of all processes together,
    so a recipe means the same on any number of them."""

    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    batch: int = limits(16, least=1)
    accumulation: int = limits(1, least=1)  # batches to one step
    clip: float = limits(1.0, least=0)  # of the gradient's norm; 0 is off
    epochs: float | None = limits(None, above=0)
    steps: int | None = limits(None, least=1)
    checkpoint_every: int = limits(500, least=1)  # steps
    seed: int = limits(0, least=0, most=2**32 - 1)
    compile: bool = False
    gradient_checkpointing: bool = False
    fsdp: bool = False  # with several processes: shard the model instead of copying it
    log_every: int = limits(10, least=1)  # steps
    log_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    spike: float = limits(10.0, least=0)  # robust deviations above the median loss from which a step is skipped; 0 is off

    def total_steps(self, examples: int) -> int:
        """Optimiser steps of the run on a data set of so many examples."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * examples / (self.batch * self.accumulation)))


def load(path: str | Path, schema: type[R], changes: Sequence[str] = ()) -> R:
    """The recipe of `path` with `changes` ("key=value", dots lead into sections) as a `schema`.

    Raises SupremumError for a file that is not YAML, an unknown key (with the nearest known), a wrong type or range.
    """
    path = Path(path)
    values, lines = _read(path)
    where = _Where(str(path), lines)
    for change in changes:
        _apply(values, change)
        where.changed.add(change.split("=")[0].strip())
    recipe: R = _section(values, schema, where, "")
    if getattr(recipe, "steps", None) is not None and getattr(recipe, "epochs", None) is not None:
        raise SupremumError(f"{where('steps')}: both steps and epochs are given.", "Keep one of them.")
    return recipe


def names(path: str | Path, key: str) -> bool:
    """Whether the recipe has this key at its top."""
    return key in _read(Path(path))[0]


def again(values: Mapping[str, Any], schema: type[R], source: str) -> R:
    """The recipe whose `plain` form is `values`, as a finished run stores it. Raises SupremumError."""
    recipe: R = _section(dict(values), schema, _Where(source, {}), "")
    return recipe


class _Where:
    """Says where a key of the recipe stands."""

    def __init__(self, path: str, lines: Mapping[str, int]) -> None:
        self.path, self.lines, self.changed = path, lines, set[str]()

    def __call__(self, key: str) -> str:
        if key in self.changed:
            return f"--set {key}"
        parts = key.split(".")
        line = next((self.lines[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in self.lines), None)
        return f"{self.path}, line {line}: {key}" if line else f"{self.path}: {key}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SupremumError(f"{path}: is larger than a recipe can be (1 MiB).", "Name a recipe, a .yaml file.")
        text = path.read_text(encoding="utf-8-sig")
        values = yaml.safe_load(text)
        lines: dict[str, int] = {}
        if isinstance(values, dict):
            _lines(yaml.compose(text, Loader=yaml.SafeLoader), "", lines, str(path))
    except OSError as error:
        raise SupremumError(f"{path}: cannot be read ({error.strerror}).", "Name a recipe, a .yaml file.") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = f", line {mark.line + 1}" if mark else ""
        raise SupremumError(f"{path}{line}: is not YAML ({reason}).", "Write `key: value` lines; see examples/.") from error
    if not isinstance(values, dict):
        raise SupremumError(f"{path}: holds no `key: value` lines.", "Write a recipe as in examples/.")
    return values, lines


def _lines(node: Any, prefix: str, found: dict[str, int], path: str) -> None:
    """Line numbers of the keys; a key that stands twice is refused, since YAML keeps the last in silence."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in found:
            raise SupremumError(f"{path}, line {key.start_mark.line + 1}: {name} stands twice (first in line "
                                f"{found[name]}).", "Keep one of them.")
        found[name] = key.start_mark.line + 1
        _lines(value, f"{name}.", found, path)


def _apply(values: dict[str, Any], change: str) -> None:
    key, sign, text = change.partition("=")
    if not sign or not key.strip():
        raise SupremumError(f"--set {change}: is not key=value.", "Write --set optimiser.lr=1e-4.")
    *path, last = key.strip().split(".")
    for part in path:
        inner = values.get(part)
        if not isinstance(inner, dict):
            inner = values[part] = {"name": inner} if isinstance(inner, str) else {}
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SupremumError(f"--set {change}: the value is not YAML.", "Put quotes around it.") from error


def _section(values: Any, schema: type, where: _Where, prefix: str) -> Any:
    """A data class from a mapping; a bare string stands for {name: string} where the section has a name."""
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    if isinstance(values, str) and "name" in fields:
        values = {"name": values}
    if not isinstance(values, dict):
        raise SupremumError(f"{where(prefix.rstrip('.'))}: is {_said(values)}, not a section.",
                            f"Its keys are {', '.join(fields)}.")
    given = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            if name in VERBS:
                raise SupremumError(f"{where(name)}: is of a recipe for `supremum {VERBS[name]}`.", "Run it with that verb.")
            near = difflib.get_close_matches(str(key), fields, 1, 0.5)
            raise SupremumError(f"{where(name)}: is no key of a recipe.",
                                f"Did you mean {prefix}{near[0]}?" if near else f"Known here: {', '.join(fields)}.")
        given[key] = _value(value, hints[key], where, name)
        _check_range(given[key], fields[key].metadata, where, name)
    for key, one in fields.items():
        if key not in given and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise SupremumError(f"{where.path}: {prefix}{key} is missing.", "Add it; the recipes in examples/ show how.")
    return schema(**given)


def _value(value: Any, kind: Any, where: _Where, name: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        for one in kinds[:-1]:
            try:
                return _value(value, one, where, name)
            except SupremumError:
                continue
        return _value(value, kinds[-1], where, name)
    if dataclasses.is_dataclass(kind):
        return _section(value, typing.cast(type, kind), where, f"{name}.")
    if origin is dict and dataclasses.is_dataclass(args[1]) and isinstance(value, dict):
        return {str(key): _section(one, typing.cast(type, args[1]), where, f"{name}.{key}.") for key, one in value.items()}
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], 1, 0.5)
        raise SupremumError(f"{where(name)}: is {_said(value)}, not one of {', '.join(map(str, args))}.",
                            f"Did you mean {near[0]}?" if near else "")
    if origin is tuple:
        many = args[-1] is Ellipsis
        items = [value] if many and isinstance(value, str) else value
        if not isinstance(items, list) or (not many and len(items) != len(args)):
            raise SupremumError(f"{where(name)}: is {_said(value)}, not a list{'' if many else f' of {len(args)}'}.", "")
        return tuple(_value(v, args[0] if many else args[i], where, f"{name}[{i}]") for i, v in enumerate(items))
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3, without a point, as a string
        except (ValueError, OverflowError):
            pass
    if isinstance(value, origin or kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise SupremumError(f"{where(name)}: is {_said(value)}, not {_WORDS.get(origin or kind, kind)}.", "")


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a section"}


def _said(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_range(value: Any, metadata: Mapping[str, Any], where: _Where, name: str) -> None:
    if not metadata or value is None:
        return
    least, most, above = (metadata.get(k, d) for k, d in (("least", -math.inf), ("most", math.inf), ("above", -math.inf)))
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int | float) and not (least <= one <= most and one > above and math.isfinite(one)):
            bounds = [f"above {above:g}"] * (above > -math.inf) + [f"at least {least:g}"] * (least > -math.inf) \
                + [f"at most {most:g}"] * (most < math.inf)
            raise SupremumError(f"{where(name)}: is {one!r}.", f"Give a value {' and '.join(bounds) or 'that is finite'}.")
