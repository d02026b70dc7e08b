"""`supremum train`: a model from scratch, as a recipe says."""

from __future__ import annotations

from pathlib import Path

from .common import Changes, Debug, Files, Fresh, Json, Out, Recipe, Result, verb


@verb("""
    supremum train examples/shakespeare-gpt.yaml --data texts --out gpt
    supremum train examples/c4-bert.yaml --data texts --set steps=200
""", resumable=True)
def train(
    recipe: Recipe,
    data: Files = Path("."),
    out: Out = None,
    changes: Changes = None,
    fresh: Fresh = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a GPT, Llama, BERT, RoBERTa, ALBERT, ELECTRA or T5 from scratch on your text.

    The result is a model folder with train.json. A run that is stopped or killed
    goes on with the same command. On several processes:
    torchrun --nproc-per-node 2 -m supremum train RECIPE.yaml ...
    (--set fsdp=true shards the model).
    """
    from rich.console import Console

    from ..train.pretrain import render
    from ..train.pretrain import train as run

    document = run(recipe, data, out, changes=changes or (), fresh=fresh)
    return document, lambda: Console().print(render(document))
