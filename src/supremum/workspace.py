"""The run folder: resumable steps, atomic writes, one process at a time.

A run keeps its state in `OUT.work/`. Each step is a pure function of the run's inputs and of earlier steps' files; its
result is written beside and renamed into place, so a file that exists is whole. Later steps read the file, in an
uninterrupted run too: a killed run therefore continues with the very bytes that an uninterrupted one would have used.

`state.json` holds the fingerprint (model, text, options, versions). It is the first file of a run and the last that
`fresh` removes, so steps never stand without the inputs they belong to. State of another run is refused by name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

from .errors import StateError, SupremumError
from .plain import plain

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LEFTOVERS = (".*.part", ".tmp*")  # of killed writes: ours, and those of safetensors inside ours


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
    except (OSError, SafetensorError) as error:
        if disk_full(error):
            raise SupremumError(f"{path}: the disk is full.", "Free space and run the same command again.") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it becomes `folder`, on failure it is removed."""
    staging = folder.resolve().with_name(f".{folder.resolve().name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        move_into_place(staging, folder)
    except OSError as error:
        if disk_full(error):
            raise SupremumError(f"{folder}: the disk is full.", "Free space and run the same command again.") from error
        if isinstance(error, PermissionError):
            raise SupremumError(f"{folder}: cannot be written ({error.strerror}).", "Choose another --out.") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_mount(folder: Path) -> None:
    """Raise SupremumError for a folder that `move_into_place` could not replace."""
    if os.path.ismount(folder.resolve()):
        raise SupremumError(f"{folder}: another file system is mounted there, which no finished folder can replace.",
                            f"Name a folder inside it, such as --out {folder / 'small'}.")


def move_into_place(staging: Path, folder: Path) -> None:
    """Replace `folder` by `staging` with two renames; the old one goes when the new one stands."""
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def disk_full(error: Exception) -> bool:
    """Whether no space or no quota is left; safetensors gives the number in words only."""
    full = errno.ENOSPC, errno.EDQUOT
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def work_folder(out: Path) -> Path:
    """Where the resumable state of a run that writes to `out` lives."""
    out = out.resolve()
    return out.with_name(out.name + ".work")


class Workspace:
    """A folder of finished steps, bound to one set of inputs and locked to this process."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Open or create `folder`. Raises StateError if it is in use, belongs to other inputs (`fresh` discards those),
        holds something else, or cannot be written."""
        self.folder = folder
        try:
            strange = folder.exists() and not (folder / "lock").exists() and any(folder.iterdir())
            if not strange:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = open(folder / "lock", "w")  # noqa: SIM115  (held for the life of the run)
        except OSError as error:
            raise StateError(f"{folder}: cannot be written ({error.strerror}).", "Choose another --out.") from error
        if strange:
            raise StateError(f"{folder}: exists and is no state of a run.", "Choose another --out, or remove it.")
        try:
            self._claim(plain(inputs), fresh)
        except BaseException:
            self.close()
            raise

    def _claim(self, wanted: dict[str, Any], fresh: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"{self.folder}: another run is using this output.",
                             "Wait for it, or choose another --out.") from error
        for leftover in [path for pattern in LEFTOVERS for path in self.folder.rglob(pattern)]:
            if leftover.is_file():
                leftover.unlink()
        state = self.folder / "state.json"
        if fresh:
            for item in sorted(self.folder.iterdir(), key=lambda item: item == state):
                if item.name != "lock":
                    shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        if not state.exists():
            if any(item.name != "lock" for item in self.folder.iterdir()):
                raise StateError(f"{self.folder}: holds steps of a run but no state.json.",
                                 "Use --fresh to discard them, or choose another --out.")
            write_atomic(state, json.dumps(wanted, indent=1, sort_keys=True).encode())
            return
        try:
            found = json.loads(state.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise StateError(f"{state}: is damaged.", "Use --fresh to discard this state, or choose another --out.")
        changed = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if changed:
            first = changed[0]
            raise StateError(
                f"{self.folder}: holds the state of another run ({', '.join(changed)} changed; "
                f"{first} was {_short(found.get(first))}, is {_short(wanted.get(first))}).",
                "Use --fresh to discard it, or choose another --out.")

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
        """Write tensors; safetensors sorts them, so their order is kept beside them."""
        from safetensors.torch import save_file  # with torch, which the text verbs do without

        with replacing(self.path(name)) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"order": json.dumps(list(tensors))})

    def load(self, name: str, keys: list[str] | None = None) -> dict[str, Tensor]:
        """The tensors, or those of `keys`, in the order in which they were given to `save`."""
        with safe_open(self.path(name), "pt") as file:
            return {k: file.get_tensor(k) for k in (keys if keys is not None else _order(file))}

    def keys(self, name: str) -> list[str]:
        """The tensors' names, in the order in which they were given to `save`."""
        with safe_open(self.path(name), "pt") as file:
            return _order(file)

    def remove(self, pattern: str) -> None:
        """Delete finished steps that nothing needs any more."""
        for path in self.folder.glob(pattern):
            path.unlink()

    def close(self) -> None:
        self._lock.close()

    def discard(self) -> None:
        """Remove the folder: the run is finished and its output is in place. state.json goes after the steps."""
        for item in [item for item in self.folder.iterdir() if item.name not in ("lock", "state.json")]:
            shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def discard_left(work: Path, inputs: dict[str, Any]) -> None:
    """Remove the state in `work` that a run which was killed at its very end left."""
    if work.exists():
        with contextlib.suppress(StateError):  # another's folder, other inputs, or a run that holds it
            Workspace(work, inputs).discard()


def _order(file: Any) -> list[str]:
    order: list[str] = json.loads(file.metadata()["order"])
    return order


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
