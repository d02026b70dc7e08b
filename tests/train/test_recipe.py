"""Recipes: what is understood, and that everything else is refused by file, line and key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from supremum.errors import SupremumError
from supremum.train.pretrain import Recipe
from supremum.train.recipe import VERBS, Training, load, names

EXAMPLES = Path(__file__).parents[2] / "examples"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_values_overrides_and_short_sections(tmp_path: Path) -> None:
    path = written(tmp_path, "optimiser: {lr: 1e-3, betas: [0.8, 0.9]}\nschedule: wsd\nsteps: 7\n")
    recipe = load(path, Training, ["optimiser.lr=5e-4", "seed=3", "schedule.decay=0.5"])
    assert (recipe.optimiser.lr, recipe.optimiser.betas, recipe.schedule.name) == (5e-4, (0.8, 0.9), "wsd")
    assert (recipe.seed, recipe.schedule.decay, recipe.steps) == (3, 0.5, 7)


@pytest.mark.parametrize(("text", "change", "says"), [
    ("seed: 1\noptimizer: adamw", "", r"r.yaml, line 2: optimizer: .*Did you mean optimiser\?"),
    ("optimiser:\n  learning: 1", "", "line 2: optimiser.learning: is no key"),
    ("schedule: cosin", "", "is 'cosin', not one of linear, cosine.*Did you mean cosine"),
    ("batch: lots", "", "line 1: batch: is 'lots', not a whole number"),
    ("batch: true", "", "not a whole number"),
    ("batch: 1.5", "", "not a whole number"),
    ("optimiser: {lr: -1}", "", "above 0"),
    ("optimiser: {lr: .nan}", "", "optimiser.lr: is nan"),
    ("optimiser: {betas: [0.9]}", "", "not a list of 2"),
    ("seed: 1\nbatch: 2\nseed: 3", "", "line 3: seed stands twice"),
    ("steps: 3\nepochs: 1", "", "both steps and epochs"),
    ("a: [", "", "is not YAML"),
    ("just words", "", "no `key: value`"),
    ("x: !!python/object/apply:os.system [ls]", "", "is not YAML"),
    ("seed: 1", "batch", "not key=value"),
    ("seed: 1", "batch=0", "--set batch: is 0.*at least 1"),
    ("seed: 1", "bach=4", "Did you mean batch"),
])
def test_refusals(tmp_path: Path, text: str, change: str, says: str) -> None:
    with pytest.raises(SupremumError, match=says):
        load(written(tmp_path, text), Training, [change] if change else [])


def test_a_recipe_of_the_other_verb_is_told_so() -> None:
    """Every key of VERBS is one of that verb's recipes alone."""
    from supremum.train.sections import Tune
    from supremum.train.several import Several

    for key, verb in VERBS.items():
        having = {kind for kind in (Recipe, Tune, Several) if key in {field.name for field in fields(kind)}}
        assert having and having <= ({Recipe} if verb == "train" else {Tune, Several}), key
    with pytest.raises(SupremumError, match=r"gpt.yaml, line \d+: text: is of a recipe for `supremum train`"):
        load(EXAMPLES / "shakespeare-gpt.yaml", Tune)
    with pytest.raises(SupremumError, match=r"lora.yaml, line \d+: task: is of a recipe for `supremum tune`"):
        load(EXAMPLES / "sst2-lora.yaml", Recipe)


def test_missing_key_and_file(tmp_path: Path) -> None:
    with pytest.raises(SupremumError, match="model is missing"):
        load(written(tmp_path, "text: [a.txt]"), Recipe)
    with pytest.raises(SupremumError, match="cannot be read"):
        load(tmp_path / "none.yaml", Recipe)


@pytest.mark.parametrize("name", ["shakespeare-gpt.yaml", "c4-bert.yaml"])
def test_examples_load(name: str) -> None:
    assert load(EXAMPLES / name, Recipe).steps == 1000


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_examples_loads(path: Path) -> None:
    from supremum.train.sections import Tune
    from supremum.train.several import Several

    kind = Recipe if names(path, "text") or names(path, "packed") else Several if names(path, "tasks") else Tune
    assert load(path, kind).batch  # type: ignore[arg-type]
