"""The recipes in examples/ are understood, so that a key that is renamed is renamed there too."""

from __future__ import annotations

from pathlib import Path

import pytest

from supremum.train.pretrain import Recipe
from supremum.train.recipe import load, names
from supremum.train.sections import Tune, settings_of
from supremum.train.several import Several
from supremum.train.tasks import make
from supremum.train.tune import check_before

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_recipe(path: Path) -> None:
    if names(path, "text"):
        assert load(path, Recipe).text
    elif names(path, "tasks"):
        recipe = load(path, Several)
        for name, part in recipe.tasks.items():
            check_before(recipe.alone(name), make(part.task.name, settings_of(part.task), str(path)), str(path))
    else:
        one = load(path, Tune)
        check_before(one, make(one.task.name, settings_of(one.task), str(path)), str(path))


def test_both_ways_of_another_domain_have_an_example() -> None:
    found = [load(path, Tune).source for path in EXAMPLES if not names(path, "text") and not names(path, "tasks")]
    assert any(source and not source.reverse for source in found) and any(source and source.reverse for source in found)
