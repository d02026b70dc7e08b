"""`supremum evaluate`: how far a model's answers are from the original's, with standard errors."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Debug, Dtype, Json, Model, Precision, Result, Seed, Text, verb


@verb("""
    supremum evaluate small --reference demo
    supremum evaluate smaller --reference models/llama --text held-out.txt
    supremum evaluate small/model.gguf --reference demo --text held-out.txt --tokens 16384 --json
    supremum evaluate small --reference demo --cache q8_0,q4_0 --tokens 4096
    supremum evaluate small --reference demo --tasks piqa.jsonl --tasks lambada.jsonl --samples 300
""")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(
        "--reference", metavar="MODEL", help="The original; with it KL and agreement are measured.")] = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Tokens to score.")] = 16384,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens in a window.")] = 1024,
    cache: Annotated[str | None, typer.Option(
        "--cache", metavar="K[,V]", help="Measure a quantised cache of keys and values instead, in llama.cpp: q8_0, q5_1, "
                                         "q5_0, q4_1, q4_0 or iq4_nl, for both or for each; or kivi8, kivi4, "
                                         "kivi2 in Transformers.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(
        "--tasks", metavar="FILE", help="Zero-shot cases (.jsonl with choices or a word to guess), or a folder of them; "
                                        "repeatable. Without --text nothing else is measured.")] = None,
    samples: Annotated[int | None, typer.Option(
        "--samples", min=1, help="Cases of each task, drawn by --seed; all unless given.")] = None,
    seed: Seed = 0,
    dtype: Dtype = Precision.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Perplexity and, against --reference, KL (mean, median, 99th percentile) and same-top-token, with errors.

    With --cache: the same of a .gguf file with that cache against its own float16 cache, and the bytes of both.
    With --tasks: accuracy with intervals and, against --reference, which answers flipped (McNemar's exact p).
    Use text that the model was not calibrated on. Without --text the reference (or MODEL, without one) writes it.
    """
    if tokens < length:
        raise typer.BadParameter(f"--tokens {tokens} is less than one window (--length {length})")

    from dataclasses import asdict

    from rich.console import Console

    from ..measure import (
        cache_types,
        evaluate_cache_files,
        evaluate_files,
        evaluate_task_files,
        render,
        render_cache,
        render_tasks,
    )

    if cache:
        found = evaluate_cache_files(model, reference, cache_types(cache), text=text, tokens=tokens, length=length, seed=seed)
        return {"model": model, "reference": reference, "cache": asdict(found)}, lambda: Console().print(render_cache(found))
    precision = "float32" if dtype is Precision.auto else dtype.value
    if tasks:
        report = evaluate_task_files(model, reference, tasks, samples=samples, seed=seed, dtype=precision)
        return {"model": model, "reference": reference, **asdict(report)}, lambda: Console().print(render_tasks(report))
    quality = evaluate_files(model, reference, text=text, tokens=tokens, length=length, seed=seed, dtype=precision)
    document = {"model": model, "reference": reference, "quality": asdict(quality)}
    return document, lambda: Console().print(render(quality))
