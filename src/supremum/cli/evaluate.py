"""`supremum evaluate`: how far a model's answers are from the original's, with standard errors."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Debug, Dtype, Json, Model, Precision, Result, Seed, Text, verb


@verb("""
    supremum evaluate small --reference demo
    supremum evaluate smaller --reference models/llama --text held-out.txt
    supremum evaluate small/model.gguf --reference demo --text held-out.txt --tokens 16384 --json
""")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(
        "--reference", metavar="MODEL", help="The original; with it KL and agreement are measured.")] = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Tokens to score.")] = 16384,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens in a window.")] = 1024,
    seed: Seed = 0,
    dtype: Dtype = Precision.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Perplexity and, against --reference, KL (mean, median, 99th percentile) and same-top-token, with errors.

    Use text that the model was not calibrated on. Without --text the reference (or MODEL, without one) writes it.
    """
    if tokens < length:
        raise typer.BadParameter(f"--tokens {tokens} is less than one window (--length {length})")

    from dataclasses import asdict

    from rich.console import Console

    from ..measure import evaluate_files, render

    precision = "float32" if dtype is Precision.auto else dtype.value
    quality = evaluate_files(model, reference, text=text, tokens=tokens, length=length, seed=seed, dtype=precision)
    document = {"model": model, "reference": reference, "quality": asdict(quality)}
    return document, lambda: Console().print(render(quality))
