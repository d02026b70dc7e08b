"""The output folder: refused where it would destroy something, written beside, proved, moved into place."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from . import __version__, codecs
from .allocate import Budget
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.architecture import objective
from .checkpoint.targets import LazyCoded, Target, target_for
from .errors import StateError, SupremumError
from .measure import samples
from .plain import plain
from .planning import Menu
from .progress import note, phase
from .report import FILE, Document, read_document
from .report.frontier import FILE as FRONTIER
from .runtime.verify import verify
from .solve.cancellation import nearest
from .stats.streaming import read_weight
from .text import fast_dtype
from .workspace import Workspace, discard_left, refuse_mount, replacing_folder, work_folder, write_atomic

CONVERTED = "converted.json"  # in the folder of a conversion: its inputs, command and proof


def check_output(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse an output that would overwrite the input, a stranger's folder, or the folder that the command runs in."""
    here, source = folder.resolve(), Path(checkpoint.path).resolve()
    if here in (Path.cwd(), *Path.cwd().parents):
        raise SupremumError(f"{folder}: the output folder is replaced as a whole, and the command runs inside it.",
                            "Name a new folder, such as --out small.")
    refuse_mount(folder)
    if here in (source, source.parent if source.is_file() else source) or here in source.parents:
        raise SupremumError(f"{folder}: holds the model that is read.", "Choose another --out.")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not is_ours(folder))):
        raise SupremumError(f"{folder}: exists and is no Supremum output.", "Choose another --out, or remove it.")


def is_ours(folder: Path) -> bool:
    """Whether a result of `optimize` or `convert` stands there."""
    return any((folder / name).is_file() for name in (FILE, FRONTIER, CONVERTED))


def check_replaced(folder: Path, inputs: dict[str, Any]) -> None:
    """Refuse to replace a result of other inputs. A run that was allowed to, and was interrupted, may go on."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((work_folder(folder) / "state.json").read_text()) == plain(inputs):
            return
    if is_ours(folder):
        command = ""
        with contextlib.suppress(StateError, OSError, ValueError, KeyError, TypeError):
            other = next((folder / name for name in (CONVERTED, FRONTIER) if (folder / name).exists()), None)
            made = json.loads(other.read_text()) if other else read_document(folder)
            command = f", made by `{made['command']}`"
        raise SupremumError(f"{folder}: holds another result{command}.", "--fresh replaces it; or choose another --out.")


def finished(folder: Path, inputs: dict[str, Any], budget: Budget) -> Document | None:
    """The document of an earlier run with the same inputs and budget, if it stands there. What that run left of its state
    when it was killed at its very end goes, unless it is in use. Raises StateError if the model itself is no longer whole."""
    try:
        document = read_document(folder)
    except (StateError, OSError):
        return None
    state: Any = document["inputs"]
    if state.get("state") != plain(inputs) or document["budget"] != plain(asdict(budget)):
        return None
    _check_whole(folder / document["result"]["file"], document["result"]["bytes"])
    discard_left(work_folder(folder), inputs)
    return document


def _nbytes(written: Path) -> int:
    """Bytes of what the runtime opens: a file, or a folder's files without ours."""
    if written.is_file():
        return written.stat().st_size
    ours = {written / name for name in (FILE, CONVERTED, "README.md", "report.html")}
    return sum(path.stat().st_size for path in written.rglob("*") if path.is_file() and path not in ours)


def _check_whole(written: Path, nbytes: int) -> None:
    """Raises StateError unless a finished model has the bytes that were written; a folder may have got more files."""
    found = _nbytes(written)
    if found < nbytes or (written.is_file() and found != nbytes):
        raise StateError(f"{written}: holds {found} bytes of the model, {nbytes} were written.", "--fresh makes it again.")


def rehearse(checkpoint: Checkpoint, kind: Target, menu: Menu, turned: Mapping[str, bool], workspace: Workspace) -> None:
    """Before the long work: one layer (and what is tied to it) by nearest rounding through export and the stock runtime.
    turned: whether a matrix is stored as its transpose."""
    def proof() -> dict[str, Any]:
        name, names = next((name, names) for name, names in menu.codecs.items() if names)
        group = next((tie for tie in menu.ties if name in tie), [name])

        def code(tensor: str) -> Any:
            weight_OI = read_weight(checkpoint, tensor, turned[tensor])
            if names[-1] == "lattice":
                from .solve.water import flat

                return flat(weight_OI)
            return nearest(weight_OI, codecs.get(names[-1]))

        folder = workspace.folder / "rehearsal"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            return verify(kind.write(checkpoint, LazyCoded(dict.fromkeys(group, names[-1]), code), folder), kind).asdict()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    with phase("rehearse export and reload"):
        workspace.json("rehearsal.json", proof)


def write(checkpoint: Checkpoint, kind: Target, coded: LazyCoded, folder: Path, expected: int) -> Path:
    """Write the files into `folder` and check that they take the expected bytes; returns what the runtime opens."""
    with phase("write"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        written = kind.write(checkpoint, coded, folder)
        found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if found != expected:
        raise SupremumError(f"{folder}: {found} bytes were written where {expected} were planned.", "Please report this.")
    return written


def show_samples(checkpoint: Checkpoint, written: Path) -> list[dict[str, Any]]:
    """The original and the written file answer the same prompts, greedily; none for models that go on with no text (encoders,
    encoder-decoders) or that do not fit the memory twice."""
    one = checkpoint.skeleton()
    parameters = sum(p.numel() for p in one.parameters())
    goes_on = objective(type(one).__name__) == "next" and not one.config.is_encoder_decoder
    if not goes_on or 8 * parameters > psutil.virtual_memory().available:
        return []
    with phase("write samples"):
        dtype = fast_dtype()
        return [sample.to_dict() for sample in samples(checkpoint.model(dtype), open_checkpoint(written).model(dtype),
                                                       checkpoint.tokenizer())]


def convert(model: str | Path, target: str, out: str | Path, *, fresh: bool = False) -> Path:
    """The same weights in another target's files, proved in its runtime; returns what the runtime opens.

    Floats keep their type, compressed weights become 16-bit floats; a GGUF's tensors stay as they are in GGUF. Nothing is
    done where the same conversion stands; fresh: do it again, or replace another result. Raises SupremumError for what the
    user can mend.
    """
    checkpoint, kind, folder = open_checkpoint(model), target_for("convert", target), Path(out)
    check_output(folder, checkpoint)
    inputs = {"supremum": __version__, "model": checkpoint.fingerprint, "target": target}
    if not fresh and (file := _converted(folder, inputs)):
        note(f"{folder}: is finished with the same inputs; --fresh runs it again.")
        return file
    if not fresh:
        check_replaced(folder, inputs)
    workspace = Workspace(work_folder(folder), inputs, fresh=fresh)  # no step is kept; one process at a time
    try:
        with replacing_folder(folder) as staging:
            with phase("write"):
                written = kind.write(checkpoint, {}, staging)
            nbytes, proof = _nbytes(written), _proof(checkpoint, kind, written)
            file = written.relative_to(staging)
            command = shlex.join(["supremum", "convert", str(model), "--target", target, "--out", str(out)])
            done = {"inputs": inputs, "command": command, "file": str(file), "bytes": nbytes, "proof": proof}
            write_atomic(staging / CONVERTED, json.dumps(plain(done), indent=1).encode())
    finally:
        workspace.discard()
    return folder / file


def _proof(checkpoint: Checkpoint, kind: Target, written: Path) -> dict[str, Any]:
    """Of the stock runtime; without one, that what was written is read again to the bit."""
    if kind.runtime:
        with phase("prove in the stock runtime"):
            return verify(written, kind).asdict()
    from .checkpoint.int8 import check_exact

    with phase("read it again"):
        check_exact(checkpoint, open_checkpoint(written))
    return {"runtime": "", "passed": True, "tensors": len(checkpoint.tensors), "means": "every tensor read again to the bit"}


def store_without_loss(model: str | Path, out: str | Path, *, fresh: bool = False) -> dict[str, Any]:
    """An archive of the bfloat16 matrices to the bit: its path, the bytes of its weights, and how many bits a weight.

    Raises SupremumError for a model without such matrices.
    """
    tensors = open_checkpoint(model).tensors.values()
    if not any(info.kind == "BF16" and len(info.shape) == 2 for info in tensors):
        raise SupremumError(f"{model}: has no bfloat16 matrices, which are what is coded without loss.",
                            "Give --size, --bits or --max-kl instead.")
    path = convert(model, "archive", out, fresh=fresh)
    nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"path": str(path), "bytes": nbytes, "bits_per_weight": 8 * nbytes / sum(math.prod(i.shape) for i in tensors)}


def _converted(folder: Path, inputs: dict[str, Any]) -> Path | None:
    """What the runtime opens, if the same conversion stands in `folder`."""
    try:
        found = json.loads((folder / CONVERTED).read_text())
        file, nbytes = folder / str(found["file"]), int(found["bytes"])
        if found["inputs"] != inputs:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _check_whole(file, nbytes)
    return file


def read_proof(folder: Path) -> dict[str, Any]:
    """Of a conversion that stands in `folder`."""
    found: dict[str, Any] = json.loads((folder / CONVERTED).read_text())["proof"]
    return found
