"""`supremum tune`: a base model made to do a task, and what it had to beat."""

from __future__ import annotations

from pathlib import Path

from .common import Changes, Debug, Files, Fresh, Json, Out, Recipe, Result, verb


@verb("""
    supremum tune examples/sst2-full.yaml --data texts --out a
    supremum tune examples/sst2-lora.yaml --data texts --out b --set epochs=1
    supremum tune examples/wnut17.yaml --data texts --out names --json
""", resumable=True)
def tune(
    recipe: Recipe,
    data: Files = Path("."),
    out: Out = None,
    changes: Changes = None,
    fresh: Fresh = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Tune a model for a task as the recipe says, or for several at once, and score it beside baselines on the same rows.

    The result is a plain Transformers folder (adapters are merged) with
    tune.json. A run that is stopped or killed goes on with the same command.
    """
    from rich.console import Console

    from ..train.recipe import names
    from ..train.show import render

    if names(recipe, "tasks"):
        from ..train.several import tune_several

        several = tune_several(recipe, data, out, changes=changes or [], fresh=fresh)
        return ({"tasks": {name: one.to_dict() for name, one in several.items()}},
                lambda: Console().print(*(render(one, name) for name, one in several.items())))
    from ..train.tune import tune as run

    done = run(recipe, data, out, changes=changes or [], fresh=fresh)
    return done.to_dict(), lambda: Console().print(render(done))
