"""`supremum limit`: what is possible, before anything is changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .bare import DEFAULT
from .common import Debug, Dtype, Json, Model, Precision, Result, Seed, Text, page_option, refuse, size_option, verb


def amount_option(text: str) -> float:
    """A number above 0 such as 1e18; wrong input is wrong usage (exit 2)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{text!r} is not a number above 0; write it like 1e18 or 250000")
    return value


def pair_option(text: str) -> tuple[float, float]:
    """Parameters and tokens as "2e6,5e8"; wrong input is wrong usage (exit 2)."""
    words = text.split(",")
    if len(words) != 2:
        raise typer.BadParameter(f"{text!r} is not parameters and tokens; write them like 2e6,5e8")
    return amount_option(words[0]), amount_option(words[1])


@verb("""
    supremum limit demo
    supremum limit models/Qwen3-0.6B --text notes.txt --tokens 32768
    supremum limit model.gguf --json > limits.json
    supremum limit small/model.gguf --reference models/llama --text notes.txt
    supremum limit --scaling --compute 1e21 --bytes 60MB
    supremum limit --scaling a.jsonl --compute 1e18 --data 1e9 --bytes 60MB
    supremum limit --scaling a.jsonl --predict 2e6,5e8 --page scaling.html
""")
def limit(
    model: Model = "demo",
    reference: Annotated[str | None, typer.Option(
        "--reference", metavar="MODEL", help="The original of a finished file: its gap, layer by layer, and where it lies.",
    )] = None,
    scaling: Annotated[str | None, typer.Option(
        "--scaling", metavar="[RUNS]",
        help="Instead of a model: the law of the training runs in RUNS (.jsonl or .csv: params, tokens, loss; or a folder of "
             "what `supremum train` wrote); without RUNS published laws and trends.")] = None,
    compute: Annotated[Any, typer.Option(
        "--compute", parser=amount_option, metavar="FLOP",
        help="With --scaling: what is best for this much compute.")] = None,
    data: Annotated[Any, typer.Option(
        "--data", parser=amount_option, metavar="TOKENS", help="Different tokens at hand; more of them are repeats.")] = None,
    nbytes: Annotated[int | None, typer.Option(
        "--bytes", parser=size_option, metavar="SIZE",
        help="Most bytes of all parameters; bits a weight are chosen, too.")] = None,
    served: Annotated[Any, typer.Option(
        "--tokens-served", parser=amount_option, metavar="TOKENS",
        help="Tokens that --compute pays for after training, too.")] = None,
    wanted: Annotated[list[Any] | None, typer.Option(
        "--predict", parser=pair_option, metavar="N,D",
        help="Predict a run of N parameters and D tokens; repeatable.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(
        "--held-out", metavar="NAME", help="Leave the run of this name out, predict it, show the error; repeatable.")] = None,
    extrapolate: Annotated[bool, typer.Option(
        "--extrapolate", help="Answer more than a decade beyond the runs, too, and say so.")] = False,
    page: Annotated[Path | None, page_option("With --scaling RUNS: write a page with the curves.")] = None,
    text: Text = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=256, help="Calibration tokens; 16384 unless given.")] = None,
    seed: Seed = 0,
    dtype: Dtype = Precision.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """What is possible: fewest bits at a given KL, KL at given bits, and what this machine can read and compute.

    Changes nothing. Each value is labelled measured, bound or estimate.
    With --reference MODEL is any finished file, ours or another's: how many bits
    it spends above the limit of its original, and what would take them off.
    With --scaling: which parameters, tokens and bits are best for a budget, and
    the least loss.
    """
    from rich.console import Console

    asked = {"--compute": compute, "--data": data, "--bytes": nbytes, "--tokens-served": served, "--predict": wanted,
             "--held-out": held_out, "--extrapolate": extrapolate, "--page": page}
    if scaling is None:
        refuse(asked, "belongs to --scaling")
    if scaling is not None:
        if model != "demo" or reference is not None or text or tokens:
            raise typer.BadParameter("--scaling takes no model and no text; its runs are named after it")
        if not compute and (nbytes or served or (data and not wanted)):
            raise typer.BadParameter("give --compute, too: the budget's FLOP")
        if scaling == DEFAULT and (wanted or held_out or page):
            raise typer.BadParameter("give the runs: --scaling RUNS.jsonl")
        document = _scaling(scaling, compute, data, nbytes, served, wanted or [], held_out or [], extrapolate, seed)
        if page is not None:
            from ..report.scaling import write_scaling

            write_scaling(document, page)
        from ..limits.scaling_page import render_scaling

        return document, lambda: Console(width=80).print(render_scaling(document))

    if reference is not None:
        from ..pipeline import measure_gap
        from ..report.gap import render_gap

        gap = measure_gap(model, reference, text=text or [], tokens=tokens, seed=seed, dtype=dtype.value)
        return gap.to_dict(), lambda: Console(width=80).print(render_gap(gap))

    from ..limits import render
    from ..pipeline import measure_limits

    found = measure_limits(model, text=text or [], tokens=tokens, seed=seed, dtype=dtype.value)
    return found.to_dict(), lambda: Console(width=80).print(render(found))


def _scaling(runs: str, compute: float | None, data: float | None, nbytes: int | None, served: float | None,
             wanted: list[tuple[float, float]], held_out: list[str], extrapolate: bool, seed: int) -> dict[str, Any]:
    from ..limits.best import Budget
    from ..limits.statistical import published, statistical_limit

    budget = Budget(compute, data, nbytes, served or 0.0) if compute else None
    if runs == DEFAULT:
        return published(budget)
    return statistical_limit(runs, budget=budget, data=data, wanted=wanted, held_out=held_out, extrapolate=extrapolate,
                             seed=seed)
