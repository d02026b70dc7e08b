"""`supremum limit`: what is possible, before anything is changed."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Debug, Dtype, Json, Model, Precision, Result, Seed, Text, verb


@verb("""
    supremum limit demo
    supremum limit models/Qwen3-0.6B --text notes.txt --tokens 32768
    supremum limit model.gguf --json > limits.json
    supremum limit small/model.gguf --reference models/llama --text notes.txt
""")
def limit(
    model: Model = "demo",
    reference: Annotated[str | None, typer.Option(
        "--reference", metavar="MODEL", help="The original of a finished file: its gap, layer by layer, and where it lies.",
    )] = None,
    text: Text = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=256, help="Calibration tokens; 16384 unless given.")] = None,
    seed: Seed = 0,
    dtype: Dtype = Precision.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """What is possible: fewest bits at a given KL, KL at given bits, and what this machine can read and compute.

    Changes nothing. Each value is labelled measured, bound or estimate. With --reference MODEL is any finished file, ours or
    another's: how many bits it spends above the limit of its original, and what would take them off.
    """
    from rich.console import Console

    if reference is not None:
        from ..pipeline import measure_gap
        from ..report.gap import render_gap

        gap = measure_gap(model, reference, text=text or [], tokens=tokens, seed=seed, dtype=dtype.value)
        return gap.to_dict(), lambda: Console(width=80).print(render_gap(gap))

    from ..limits import render
    from ..pipeline import measure_limits

    found = measure_limits(model, text=text or [], tokens=tokens, seed=seed, dtype=dtype.value)
    return found.to_dict(), lambda: Console(width=80).print(render(found))
