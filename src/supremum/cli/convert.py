"""`supremum convert`: the same weights for another runtime, without compressing them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, Json, Result, target_option, verb


@verb("""
    supremum convert small --target compressed-tensors --out floats
    supremum convert models/llama --target gguf --out llama-gguf
    supremum convert archived --target int8 --out integers
""")
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, hub id, .gguf file, `demo` or `minilm`.")],
    target: Annotated[str, target_option("convert")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace another result, or convert again.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write MODEL's weights for another runtime, and prove the result there.

    Floats keep their type, compressed weights become 16-bit floats; a GGUF's
    tensors stay as they are in GGUF; an archive's integers stay integers with
    --target int8. To make a model smaller use `supremum optimize`.
    """
    from ..output import read_proof
    from ..pipeline import convert as run
    from ..report.words import attested

    written = Path(run(model, target, out, fresh=fresh))
    proof = read_proof(out)
    return ({"model": model, "target": target, "path": str(written), "proof": proof},
            lambda: print(f"Written: {written}\n{attested(proof)}"))
