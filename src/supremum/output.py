"""The output folder: refused where it would destroy something, written beside, proved, moved into place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from . import codecs
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.targets import LazyCoded, Target
from .checkpoint.targets import target as target_named
from .codecs import Coded
from .errors import StateError, SupremumError
from .measure import samples
from .measure.answers import objective
from .planning import Menu
from .progress import phase
from .report import Document, read_document
from .runtime.verify import verify
from .solve.cancellation import nearest
from .stats.streaming import BlockStream, orientation
from .text import fast_dtype
from .workspace import Workspace, plain


def check_output(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse an output that would overwrite the input, a stranger's folder, or the folder that the command runs in."""
    here, source = folder.resolve(), Path(checkpoint.path).resolve()
    if here in (Path.cwd(), *Path.cwd().parents):
        raise SupremumError(f"{folder}: the output folder is replaced as a whole, and the command runs inside it.",
                            "Name a new folder, such as --out small.")
    if here in (source, source.parent if source.is_file() else source) or here in source.parents:
        raise SupremumError(f"{folder}: holds the model that is read.", "Choose another --out.")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "supremum.json").exists())):
        raise SupremumError(f"{folder}: exists and is no Supremum output.", "Choose another --out, or remove it.")


def finished(folder: Path, inputs: dict[str, Any]) -> Document | None:
    """The document of an earlier run with the same inputs, if it stands there."""
    try:
        document = read_document(folder)
    except (StateError, OSError):
        return None
    state: Any = document["inputs"]
    return document if state.get("state") == plain(inputs) else None


def rehearse(checkpoint: Checkpoint, kind: Any, menu: Menu, workspace: Workspace) -> None:
    """Before the long work: one layer (and what is tied to it) by nearest rounding through export and the stock runtime."""
    def rehearse() -> dict[str, Any]:
        name, names = next((name, names) for name, names in menu.codecs.items() if names)
        group = next((tie for tie in menu.ties if name in tie), [name])
        turned = {tensor: swap for tensor, (_, swap) in orientation(BlockStream(checkpoint, dtype=torch.float32)).items()}

        def code(tensor: str) -> Coded:
            weight = checkpoint.read(tensor).float()
            return nearest(weight.T.contiguous() if turned[tensor] else weight, codecs.get(names[-1]))

        folder = workspace.folder / "rehearsal"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            return verify(kind.write(checkpoint, LazyCoded(dict.fromkeys(group, names[-1]), code), folder), kind).asdict()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    with phase("rehearse export and reload"):
        workspace.json("rehearsal.json", rehearse)


def write(checkpoint: Checkpoint, kind: Target, coded: LazyCoded, workspace: Workspace) -> Path:
    """Write the files beside the output and check their size against the plan's; returns what the runtime opens."""
    folder = workspace.folder / "output"
    expected = kind.size(checkpoint, coded.plan)
    with phase("write"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        written = kind.write(checkpoint, coded, folder)
        found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if found != expected:
        raise SupremumError(f"{folder}: {found} bytes were written where {expected} were planned.", "Please report this.")
    return written


def show_samples(checkpoint: Checkpoint, written: Path) -> list[dict[str, Any]]:
    """The original and the written file answer the same prompts, greedily; none for models that write no text or that
    do not fit the memory twice."""
    one = checkpoint.skeleton()
    parameters = sum(p.numel() for p in one.parameters())
    if objective(one) != "next" or 8 * parameters > psutil.virtual_memory().available:
        return []
    with phase("write samples"):
        dtype = fast_dtype()
        return [sample.to_dict() for sample in samples(checkpoint.model(dtype), open_checkpoint(written).model(dtype),
                                                       checkpoint.tokenizer())]


def move_into_place(staging: Path, folder: Path) -> None:
    """Replace `folder` by `staging` with two renames; the old one goes when the new one stands."""
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    shutil.rmtree(old, ignore_errors=True)


def convert(model: str | Path, target: str, out: str | Path) -> Path:
    """The same weights in another target's files; nothing is lost that the target can hold. Returns the written path."""
    checkpoint, kind, folder = open_checkpoint(model), target_named(target), Path(out)
    check_output(folder, checkpoint)
    staging = folder.resolve().with_name(f".{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        written = kind.write(checkpoint, {}, staging)
        move_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder / written.relative_to(staging)
