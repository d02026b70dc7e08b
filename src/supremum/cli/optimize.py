"""`supremum optimize`: a model and a budget go in, a smaller model with its proof comes out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .bare import DEFAULT, bits_option
from .common import (
    Debug,
    Dtype,
    Json,
    Model,
    Precision,
    Result,
    Seed,
    Text,
    floor_option,
    refuse,
    size_option,
    speed_option,
    target_option,
    verb,
)


@verb("""
    supremum optimize demo --size 75MB --tokens 4096 --out small
    supremum optimize models/llama --bits 3.5 --text notes.txt --out smaller
    supremum optimize models/llama --bits 3.5 --target compressed-tensors
    supremum optimize models/llama --bits 5 --only Q4_0 --only Q8_0
    supremum optimize models/llama --bits 2.3 --out tiny
    supremum optimize models/llama --bits 4.25 --quick
    supremum optimize models/llama --max-kl 0.05 --size 900MB --keep embed
    supremum optimize models/llama --bits 3 --target archive --out archived
    supremum optimize models/llama --speed 2x --memory 900MB
    supremum optimize sst2 --floor accuracy=0.99x --target archive --text a.txt
    supremum optimize models/llama --frontier --out points
    supremum optimize demo --frontier 2.5,3,4 --target archive
    supremum optimize models/llama --lossless --out lossless
""", resumable=True)
def optimize(
    model: Model = "demo",
    size: Annotated[int | None, typer.Option(
        "--size", parser=size_option, metavar="SIZE", help="Largest output, for example 75MB or 1.2GiB.")] = None,
    bits: Annotated[float | None, typer.Option(
        "--bits", min=1, max=16, help="Bits a weight of the blocks' linear layers, scales included.")] = None,
    max_kl: Annotated[float | None, typer.Option(
        "--max-kl", metavar="NATS", help="Largest KL from the original, nats a token; the smallest such file.")] = None,
    memory: Annotated[int | None, typer.Option(
        "--memory", parser=size_option, metavar="SIZE",
        help="Largest resident memory of llama.cpp with a cache of 1024 tokens, measured here.")] = None,
    speed: Annotated[str | None, typer.Option(
        "--speed", metavar="2x|TOKENS", parser=speed_option,
        help="Least speed of writing in llama.cpp, measured here: times the original's, or tokens a second.")] = None,
    frontier: Annotated[str | None, typer.Option(
        "--frontier", metavar="[BITS,...]", parser=bits_option,
        help="Instead of one budget: a finished folder for each of these bits a weight, and their curve; without a list "
             "2, 2.25, 2.5, 3, 3.5, 4, 5, 6, 8, as far as the target reaches; GGUF's least types take longest.")] = None,
    floor: Annotated[str | None, typer.Option(
        "--floor", metavar="NAME=0.99x", parser=floor_option,
        help="Of a model from `supremum tune`: the smallest file whose task metric keeps this, times the original's (0.99x) "
             "or as a number, on the recipe's valid rows. With another budget: refuse what misses it.")] = None,
    floor_data: Annotated[Path | None, typer.Option(
        "--floor-data", metavar="DIR", help="Folder of the recipe's rows, if it is not the one tuned on.")] = None,
    lossless: Annotated[bool, typer.Option(
        "--lossless", help="No budget: an archive of the bfloat16 weights to the bit, in about two thirds of their bytes.",
    )] = False,
    target: Annotated[str | None, target_option("optimize", " gguf unless given.")] = None,
    text: Text = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=256, help="Calibration tokens; 16384 unless given.")] = None,
    out: Annotated[Path | None, typer.Option(
        "--out", metavar="DIR", help="Output folder; NAME-supremum unless given.")] = None,
    keep: Annotated[list[str] | None, typer.Option(
        "--keep", metavar="NAME", help="Leave tensors whose name contains NAME as they are; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(
        "--only", metavar="CODEC", help="Choose from these formats only, for example Q4_0, or int4-g64 of "
        "compressed-tensors; repeatable.")] = None,
    quick: Annotated[bool, typer.Option(
        "--quick", help="Solve every layer once and train nothing: sooner done, more damage.")] = False,
    fresh: Annotated[bool, typer.Option(
        "--fresh/--resume", help="Start over and replace a result in DIR, or continue an interrupted run.")] = False,
    seed: Seed = 0,
    dtype: Dtype = Precision.auto,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Compress MODEL to a budget: the format of every layer is chosen by its damage, and the result is proved.

    Give one of --size, --bits, --max-kl, --memory, --speed and --floor, or
    several: all of them hold. Or --frontier, or --lossless.
    The folder holds the model, supremum.json, report.html and a model card; of a
    frontier, one such folder a point; of --lossless the model and converted.json.
    """
    kind = target or "gguf"
    folder = out or Path(f"{Path(os.path.abspath(model)).name.removesuffix('.gguf')}-supremum")  # of "." the folder's name
    budget = any(value is not None for value in (size, bits, max_kl, memory, speed))
    if floor_data and not floor:
        raise typer.BadParameter("--floor-data says where the rows of --floor are; give both")
    if frontier is not None:
        if budget or lossless or floor:
            raise typer.BadParameter("--frontier takes no other budget")
        from ..frontier import optimize_frontier
        from ..report.frontier import show_frontier

        points = optimize_frontier(
            model, None if frontier == DEFAULT else [float(word) for word in frontier.split(",")], target=kind,
            text=text or [], tokens=tokens, out=folder, keep=keep or [], only=only or [], quick=quick, fresh=fresh,
            seed=seed, dtype=dtype.value)
        return points.frontier, lambda: show_frontier(points.frontier, points.folder)
    if lossless:
        if budget or floor:
            raise typer.BadParameter("--lossless takes no budget")
        refuse({"--target": target not in (None, "archive"), "--text": text, "--tokens": tokens, "--keep": keep,
                "--only": only, "--quick": quick, "--seed": seed, "--dtype": dtype is not Precision.auto},
               "has no part in --lossless: an archive of the weights as they are")
        from ..pipeline import store_without_loss

        stored = store_without_loss(model, folder, fresh=fresh)
        return stored, lambda: print(f"Written: {stored['path']}, {stored['bytes']} bytes of weights, "
                                     f"{stored['bits_per_weight']:.2f} bits a weight")
    if not budget and not floor:
        raise typer.BadParameter("give a budget: --size 75MB, --bits 3.5, --max-kl 0.05, --memory 200MB, --speed 2x or "
                                 "--floor accuracy=0.99x (or several), or --frontier")
    if max_kl is not None and not 0 < max_kl < 10:
        raise typer.BadParameter(f"--max-kl {max_kl} is not a number of nats between 0 and 10; 0.05 is a good start")

    from ..pipeline import Budget
    from ..pipeline import optimize as run
    from ..report.terminal import show_result

    given = Budget(size, bits, max_kl, memory, speed) if budget else None
    options: dict[str, Any] = {"target": kind, "text": text or [], "tokens": tokens, "out": folder, "keep": keep or [],
                               "only": only or [], "quick": quick, "fresh": fresh, "seed": seed, "dtype": dtype.value}
    if floor is not None:
        from ..floor import Floor, optimize_floor

        result = optimize_floor(model, Floor.parse(floor), given, data=floor_data, **options)
    else:
        assert given is not None
        result = run(model, given, **options)
    return result.document, lambda: show_result(result.document, result.folder)
