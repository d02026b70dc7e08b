"""`supremum train`: a model from scratch, as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, Json, Result, verb


@verb("""
    supremum train examples/shakespeare-gpt.yaml --data texts --out gpt
    supremum train examples/c4-bert.yaml --data texts --set steps=200
""", resumable=True)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train; see examples/ and docs/train.md.")],
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder that the recipe's paths begin in.")] = Path("."),
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR",
                                             help="Output folder; by default the recipe's name.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE",
                                                      help="Change a value of the recipe; repeatable.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again, discarding an earlier run or result.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a GPT, Llama, BERT, RoBERTa, ALBERT, ELECTRA or T5 from scratch on your text.

    On several processes: torchrun --nproc-per-node 2 -m supremum train RECIPE.yaml ... (--set fsdp=true shards the model).
    A run that is stopped or killed goes on with the same command. The result is a model folder with train.json.
    """
    from rich.console import Console

    from ..train.pretrain import render
    from ..train.pretrain import train as run

    document = run(recipe, data, out, changes=changes or (), fresh=fresh)
    return document, lambda: Console().print(render(document))
