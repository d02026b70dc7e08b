"""`supremum train`: a recipe, text and a seed in; a model folder with train.json out.

    text or packed tokens -> tokenizer -> chunks -> (the last `held_out` kept apart) -> leaks -> fit -> held-out loss -> DIR

MFU, the share of the machine's peak: tokens/s x 6 N over the best rate of matrix products of the run's number type measured
just before it on as many threads; N counts parameters that are multiplied (Chowdhery et al. 2022, arXiv:2204.02311, whose
attention term is left out).
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed as dist

from .. import __version__
from ..errors import SupremumError
from ..limits.runs import TRAINED as FILE  # in a result: how it was trained
from ..plain import plain
from ..progress import note, phase
from ..text.packed import fingerprint, read_index
from ..text.sources import files_of
from ..versions import version_of
from ..workspace import Workspace
from .corpus import Chunks, PackedChunks, TokenizerRecipe, chunks, make_tokenizer, packed_chunks
from .leaks import held_out_leaks, in_words
from .models import Model, build, multiplied, objective_of
from .objectives import LOSSES, Hide, Objective, Pad, PadReplaced, wrapped
from .recipe import Training, limits, load
from .result import check_out, put_document, standing
from .trainer import Fitted, check, fit, open_run, world

PRODUCTS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
HELD_MOST = 512  # chunks that the held-out loss is taken on


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """A pre-training recipe."""

    model: Model
    text: tuple[str, ...] = ()  # files below --data, or hub data sets
    packed: str | None = None  # instead of text: a folder below --data that `supremum text pack` wrote, with its tokenizer
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    objective: Objective | None = None  # by default the family's
    length: int = limits(256, least=8)  # tokens of a chunk
    documents: Literal["joined", "separate"] = "joined"
    held_out: float = limits(0.05, least=0, most=0.5)  # share of the chunks, at the end of the text
    leaks: bool = True  # look for the held-out text in the training text


def train(recipe_file: str | Path, data: str | Path = ".", out: str | Path | None = None, *, changes: Sequence[str] = (),
          fresh: bool = False) -> dict[str, Any]:
    """Train the model of a recipe, or go on with it; returns what train.json holds. Raises SupremumError."""
    recipe = load(recipe_file, Recipe, changes)
    objective = objective_in(recipe)
    folder = Path(out) if out else Path(Path(recipe_file).stem)
    check_out(folder, FILE)
    check(recipe, world()[1])
    sources = _packed(recipe, objective, Path(data)) if recipe.packed else _sources(recipe.text, Path(data))
    sums = [fingerprint(read_index(sources[0]))] if recipe.packed else sums_of(sources)
    inputs = {"supremum": __version__, "torch": torch.__version__, "recipe": plain(recipe), "text": sums}
    if done := standing(folder, FILE, inputs, fresh=fresh):
        return done
    run = folder.with_name(folder.name + ".work")
    state = open_run(run, inputs, fresh=fresh)
    try:
        document = _train(recipe, objective, sources, folder, run, state, inputs)
        if state:
            state.discard()
        return document
    finally:
        if state:
            state.close()


def objective_in(recipe: Recipe) -> Objective:
    wanted = objective_of(recipe.model.family)
    objective = recipe.objective or Objective(name=wanted)  # type: ignore[arg-type]
    if objective.name != wanted:
        raise SupremumError(f"objective: {objective.name} does not go with {recipe.model.family}, which learns {wanted}.",
                            "Change objective.name or model.family.")
    if recipe.length > recipe.model.context and recipe.model.family != "t5":
        raise SupremumError(f"length: {recipe.length} is more than model.context, {recipe.model.context}.",
                            "Make them equal.")
    return objective


def _train(recipe: Recipe, objective: Objective, sources: list[Path], folder: Path, run: Path, state: Workspace | None,
           inputs: dict[str, Any]) -> dict[str, Any]:
    first = world()[0] == 0
    with phase("read text"):
        if recipe.packed:
            tokenizer = make_tokenizer(TokenizerRecipe(str(sources[0] / "tokenizer")), (), objective.name, recipe.length)
            every: Chunks | PackedChunks = packed_chunks(sources[0], tokenizer, recipe.length, objective.name)
        else:
            tokenizer = make_tokenizer(recipe.tokenizer, sources, objective.name, recipe.length)
            every = chunks(tokenizer, sources, recipe.length, recipe.documents, objective.name)
        learned, held = every.split(recipe.held_out)
    leaks = state.json("leaks.json", lambda: _leaks(learned, held, tokenizer)) if state and recipe.leaks else None
    torch.manual_seed(recipe.seed)
    model: Any = wrapped(build(recipe.model, tokenizer), objective)
    numbers = {"parameters": sum(p.numel() for p in model.parameters()), "multiplied": multiplied(model)}
    if first:
        note(f"{numbers['parameters']:,} parameters, {len(learned):,} chunks of {recipe.length} tokens, "
             f"{recipe.total_steps(len(learned)):,} steps")
    peak = _peak(recipe) if first else 0.0
    pad = tokenizer.pad_token_id or 0
    start = model.config.decoder_start_token_id if objective.name == "span" else None
    collator = PadReplaced(pad) if objective.name == "replaced" else Pad(pad, start)
    hide = Hide(objective, tokenizer)
    fitted = fit(model, learned, recipe, run, collator=collator, transform=hide, loss=LOSSES[objective.name],
                 at_peak=peak / (6 * numbers["multiplied"]))
    with phase("held-out loss"):
        losses = held_out(fitted, held, hide, collator, objective.name, recipe)
    document = _document(recipe, objective, inputs, fitted, numbers, peak, losses, leaks, len(learned))
    return _write(fitted, tokenizer, document, folder)


@torch.no_grad()
def held_out(fitted: Fitted, held: Chunks | PackedChunks, hide: Hide, collator: Pad, name: str, recipe: Recipe,
             ) -> dict[str, float] | None:
    """Mean loss a token over the held-out chunks, each hidden in one way that the seed fixes, with its standard error over
    chunks."""
    places = _places_scored(held)
    if not places:
        return None
    model, device = fitted.trainer.model_wrapped if recipe.fsdp else fitted.trainer.model, fitted.trainer.args.device
    assert model is not None
    model.eval()
    sums, items = [], []
    for index in places:
        example = hide(held[index], np.random.default_rng([recipe.seed, 2, index]))
        batch = {key: value.to(device) for key, value in collator([example]).items()}
        labels = batch.pop("labels")
        items.append(int((labels != -100).sum()))
        sums.append(float(LOSSES[name](model(**batch), labels, 1)))
    model.train()
    total, mean, count = sum(items), sum(sums) / max(1, sum(items)), len(places)
    spread = math.sqrt(sum((s - mean * n) ** 2 for s, n in zip(sums, items, strict=True)) * count / max(1, count - 1)) / total
    return {"loss": mean, "error": spread, "tokens": total}


def _places_scored(held: Chunks | PackedChunks) -> list[int]:
    """The chunks that the held-out loss is taken on, evenly over all."""
    return [int(index) for index in np.linspace(0, len(held) - 1, min(len(held), HELD_MOST))]


def _leaks(learned: Chunks | PackedChunks, held: Chunks | PackedChunks, tokenizer: Any) -> dict[str, Any] | None:
    """What of the held-out text stands in the training text, said if any does."""
    found = held_out_leaks(learned, held, _places_scored(held), tokenizer)
    if found and found.leaked:
        note(f"{in_words(asdict(found))}: the held-out loss says less of new text.")
    return asdict(found) if found else None


def _document(recipe: Recipe, objective: Objective, inputs: dict[str, Any], fitted: Fitted, numbers: dict[str, int],
              peak: float, losses: dict[str, float] | None, leaks: dict[str, Any] | None, examples: int) -> dict[str, Any]:
    state = fitted.state
    rate = fitted.tokens_per_second
    return plain({
        "inputs": inputs, "command": shlex.join(["supremum", *sys.argv[1:]]), "objective": asdict(objective),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "accelerate", "tokenizers", "numpy")},
        "machine": {"processor": platform.processor() or platform.machine(), "device": fitted.trainer.args.device.type,
                    "processes": world()[1], "threads": torch.get_num_threads(), "peak_flop_s": peak},
        "seed": recipe.seed, "steps": fitted.steps, "examples": examples, **numbers,
        "tokens": state.tokens, "seconds": state.seconds, "joules": state.joules or None, "tokens_per_second": rate,
        "mfu": rate * 6 * numbers["multiplied"] / peak if peak else None,
        "loss": state.loss, "held_out": losses, "leaks": leaks,
        "skipped": state.skipped,
        "curve": [dict(zip(("step", "loss", "rate"), point, strict=True)) for point in state.curve],
    })


def _write(fitted: Fitted, tokenizer: Any, document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Model, tokenizer and train.json beside, then moved into place; with FSDP every process has a part in gathering."""
    from ..workspace import move_into_place

    first = world()[0] == 0
    staging = folder.resolve().with_name(f".{folder.resolve().name}.part")
    if first:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    trainer = fitted.trainer
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model)
    if first:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        prefix = "discriminator."
        if hasattr(model, "discriminator"):
            model = model.discriminator
            weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        model.config.use_cache = True
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        model._keys_to_ignore_on_save = None  # computed tables of places, too: a folder is whole without its class's code
        model.save_pretrained(staging, state_dict=weights)
        tokenizer.save_pretrained(staging)
        document = put_document(staging, FILE, document)
        move_into_place(staging, folder)
    if dist.is_initialized():
        dist.barrier()
    return document


def _peak(recipe: Recipe) -> float:
    """Operations per second of the machine at the run's number type, all processes of the run together."""
    from ..limits.hardware import matmul_rate

    device, threads = ("cuda", 1) if torch.cuda.is_available() else ("cpu", torch.get_num_threads())
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with phase("measure the peak"):
        size = {"size": 4096} if device == "cuda" else {}
        found = matmul_rate(PRODUCTS[recipe.precision], threads * (local if device == "cpu" else 1), device=device, **size)
    return found[1] * (world()[1] / local if device == "cpu" else world()[1]) if found else 0.0


def _sources(text: Sequence[str], data: Path) -> list[Path]:
    """Each text below `data`; a name with a drive or root of its own stays, and what is no file may be a hub data set."""
    if not text:
        raise SupremumError("text: names nothing.", "List files below --data, or give packed.")
    if not data.is_dir():
        raise SupremumError(f"{data}: is no folder.", "Name the folder of the data with --data.")
    found = []
    for name in text:
        path = data / name
        if not path.exists() and (Path(name).suffix or "/" not in name):
            raise SupremumError(f"{path}: no such file.", "Name its folder with --data, or mend `text` in the recipe.")
        found.append(path if path.exists() else Path(name))
    return found


def _packed(recipe: Recipe, objective: Objective, data: Path) -> list[Path]:
    """The packed folder; what a recipe cannot ask of it is refused."""
    for key, stands in (("text", bool(recipe.text)), ("tokenizer", recipe.tokenizer != TokenizerRecipe()),
                        ("documents", recipe.documents != "joined")):
        if stands:
            raise SupremumError(f"{key}: does not go with packed, whose tokens are fixed and joined.", f"Leave {key} out.")
    if objective.name in ("masked", "replaced") and objective.whole_words:
        raise SupremumError("packed: holds tokens without where words begin, and the objective hides whole words.",
                            "Set objective.whole_words to false, or give text.")
    return [data / str(recipe.packed)]


def sums_of(sources: Sequence[Path]) -> list[str]:
    """sha256 of every file of the text: a run goes on with the text that it began with."""
    sums = []
    for source in sources:
        for path in files_of(str(source)):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            sums.append(digest.hexdigest())
    return sums


def render(document: dict[str, Any]) -> Any:
    """The result as a table."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    held, mfu, joules = document["held_out"], document["mfu"], document["joules"]
    rows = [
        ("parameters", f"{document['parameters']:,}"), ("steps", f"{document['steps']:,}"),
        ("tokens", f"{document['tokens']:,}"), ("training loss", f"{document['loss']:.4f}" if document["loss"] else "-"),
        ("held-out loss", f"{held['loss']:.4f} +- {held['error']:.4f}" if held else "-"),
        ("held-out text", in_words(document["leaks"]) if document["leaks"] else "not looked for in the training text"),
        ("time", f"{document['seconds']:.0f} s" + (f", {joules / 3600:.1f} Wh" if joules else "")),
        ("speed", f"{document['tokens_per_second']:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")),
        ("skipped steps", str(len(document["skipped"]))),
    ]
    for row in rows:
        table.add_row(*row)
    return table
