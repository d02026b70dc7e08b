"""`supremum tune`: a base model made to do a task, and what it had to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, Json, Result, verb


@verb("""
    supremum tune examples/sst2-full.yaml --data texts --out a
    supremum tune examples/sst2-lora.yaml --data texts --out b --set epochs=1
    supremum tune examples/wnut17.yaml --data texts --out names --json
""", resumable=True)
def tune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (.yaml); examples/ holds some.")],
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder that the recipe's files are in.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder: the model and tune.json.")],
    changes: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE", help="Another value for a key of the recipe (optimiser.lr=1e-4); repeatable.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again, and replace what stands there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Tune a model for a task as RECIPE says, or for several at once, and score it beside baselines on the same test rows.

    The result is a plain Transformers folder (adapters are merged). A killed run goes on from its last checkpoint with
    the same command.
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
