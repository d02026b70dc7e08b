"""The run folder: resumable steps, atomic writes, one process at a time.

A run keeps its state in `OUT.work/`. Each step is a pure function of the run's inputs and of earlier steps' files; its
result is written beside and renamed into place, so a file that exists is whole. Later steps read the file, in an
uninterrupted run too: a killed run therefore continues with the very bytes that an uninterrupted one would have used.

`state.json` holds the fingerprint (model, text, options, versions). State of another run is refused by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StateError, SupremumError

T = TypeVar("T")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, and move it into place."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and becomes `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno == 28:
            raise SupremumError(f"{path}: the disk is full.", "Free space and run the same command again.") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON holds it, so that states can be compared."""
    state: dict[str, Any] = json.loads(json.dumps(dict(inputs), sort_keys=True, default=str))
    return state


class Workspace:
    """A folder of finished steps, bound to one set of inputs and locked to this process."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Open or create `folder`. Raises StateError if it is in use or belongs to other inputs (`fresh` discards it)."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")  # noqa: SIM115  (held for the life of the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StateError(f"{folder}: another run is using this output.",
                             "Wait for it, or choose another --out.") from error
        state = folder / "state.json"
        wanted = plain(inputs)
        if fresh:
            for item in folder.iterdir():
                if item.name != "lock":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        if state.exists():
            try:
                found = json.loads(state.read_text())
            except ValueError:
                found = {}
            changed = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
            if changed:
                first = changed[0]
                self.close()
                raise StateError(
                    f"{folder}: holds the state of another run ({', '.join(changed)} changed; "
                    f"{first} was {_short(found.get(first))}, is {_short(wanted.get(first))}).",
                    "Use --fresh to discard it, or choose another --out.")
        else:
            write_atomic(state, json.dumps(wanted, indent=1, sort_keys=True).encode())
        for leftover in folder.rglob(".*.part"):
            leftover.unlink()

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """The step's result as JSON: read from `name`, or computed, written and read back."""
        path = self.path(name)
        if not path.exists():
            write_atomic(path, json.dumps(compute()).encode())
        return json.loads(path.read_text())

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The step's result as tensors: read from `name`, or computed, written and read back."""
        if not self.has(name):
            self.save(name, compute())
        return self.load(name)

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        with replacing(self.path(name)) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)

    def load(self, name: str, keys: list[str] | None = None) -> dict[str, Tensor]:
        with safe_open(self.path(name), "pt") as file:
            return {k: file.get_tensor(k) for k in (keys if keys is not None else file.keys())}

    def keys(self, name: str) -> list[str]:
        with safe_open(self.path(name), "pt") as file:
            return list(file.keys())

    def remove(self, pattern: str) -> None:
        """Delete finished steps that nothing needs any more."""
        for path in self.folder.glob(pattern):
            path.unlink()

    def close(self) -> None:
        self._lock.close()

    def discard(self) -> None:
        """Remove the folder: the run is finished and its output is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
