"""What `train` and `tune` leave: a model's folder with a document that names its files and what they were made of.

The same command finds it finished; another result, or a folder of something else, is not replaced unasked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError, SupremumError
from ..plain import plain
from ..progress import note
from ..workspace import discard_left, refuse_mount, write_atomic
from .trainer import world


def check_out(folder: Path, file: str) -> None:
    """Raise SupremumError for a folder that no result may replace."""
    here = folder.resolve()
    if here in (Path.cwd(), *Path.cwd().parents):
        raise SupremumError(f"{folder}: the output folder is replaced as a whole, and the command runs inside it.",
                            "Name a new folder, such as --out model.")
    refuse_mount(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / file).is_file())):
        verb = file.removesuffix(".json")
        raise SupremumError(f"{folder}: exists and is no result of {verb}.", "Choose another --out, or remove it.")


def standing(folder: Path, file: str, inputs: Mapping[str, Any], *, fresh: bool) -> dict[str, Any] | None:
    """The document of a finished run with these inputs; None where there is no result, or a `fresh` one is wanted.

    Raises StateError if its files are no longer whole, SupremumError if the result is another one."""
    if fresh or not (folder / file).is_file():
        return None
    try:
        document: dict[str, Any] = json.loads((folder / file).read_text())
        same = document["inputs"] == plain(inputs)
        files = {name: int(size) for name, size in document["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise SupremumError(f"{folder}: holds another result.", "--fresh replaces it; or choose another --out.")
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise StateError(f"{path}: is not as it was written ({size} bytes).", "--fresh makes it again.")
    if world()[0] == 0:
        discard_left(folder.with_name(f"{folder.name}.work"), dict(inputs))
    note(f"{folder}: is finished with the same recipe; --fresh runs it again.")
    return document


def put_document(folder: Path, file: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Write the document of a folder that holds all else; returns it as it is written, with `files` and their bytes."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    written: dict[str, Any] = plain({**document, "files": files})
    write_atomic(folder / file, json.dumps(written, indent=1, default=str).encode())
    return written
