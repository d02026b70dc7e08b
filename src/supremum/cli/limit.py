"""`supremum limit`: what is possible, before anything is changed."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Debug, Dtype, Json, Model, Precision, Result, Seed, Text, verb


@verb("""
    supremum limit demo
    supremum limit models/Qwen3-0.6B --text notes.txt --tokens 32768
    supremum limit model.gguf --json > limits.json
""")
def limit(
    model: Model = "demo",
    text: Text = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=256, help="Calibration tokens; 16384 unless given.")] = None,
    seed: Seed = 0,
    dtype: Dtype = Precision.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """What is possible: fewest bits at a given KL, KL at given bits, and what this machine can read and compute.

    Changes nothing. Each value is labelled measured, bound or estimate.
    """
    from rich.console import Console

    from ..limits import render
    from ..pipeline import measure_limits

    found = measure_limits(model, text=text or [], tokens=tokens, seed=seed, dtype=dtype.value)
    return found.to_dict(), lambda: Console(width=80).print(render(found))
