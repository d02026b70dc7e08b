"""A pass over documents that goes on where it was cut off.

.OUT.work/ beside OUT holds the files that the pass appends to, and progress.json: how many documents are in them, their
checksum, the files' sizes, what the pass counted, and the run's identity. It is written every EVERY seconds, after the files
were flushed to the disk, so that what it says stands there. A run of the same identity cuts the files to these sizes, reads
past these documents without working on them, and goes on; another one, or a damaged state, begins anew. What reading counts
(documents, faults) is counted again.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from ..errors import StateError, SupremumError
from ..plain import plain
from ..progress import note
from ..workspace import Workspace, disk_full, write_atomic

EVERY = 10.0  # seconds; what a killed run does twice
PROGRESS = "progress.json"


class Work:
    """`documents`: those that are done; `counts`: what was saved with them, None at the beginning."""

    def __init__(self, folder: Path, identity: dict[str, str], fresh: bool) -> None:
        self.folder = folder
        found = read_state(folder)
        if found and (changed := [name for name in identity if found["identity"].get(name) != identity[name]]):
            note(f"begins anew: the run that was cut off differs in its {' and '.join(changed)}.")
            found = None
        elif found:
            note(f"goes on after {found['documents']:,} documents of the run that was cut off.")
        elif (folder / PROGRESS).exists():
            note("begins anew: the state of the run that was cut off is damaged.")
        self.state = found or {"documents": 0, "crc": 0, "sizes": {}, "counts": None, "seconds": 0.0,
                               "identity": identity, "fresh": fresh}
        self.documents, self.counts = self.state["documents"], self.state["counts"]
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            name = path.relative_to(folder).as_posix()
            if name in self.state["sizes"]:
                os.truncate(path, self.state["sizes"][name])
            elif name not in ("lock", "state.json") and not (found and name == PROGRESS):
                path.unlink()
        self._crc = self.state["crc"]
        self._ahead: deque[int] = deque()  # checksums up to each document that was read and is not done
        self._files: dict[str, BinaryIO] = {}
        self._open = ExitStack()
        self._saved = time.monotonic()
        self._began = self._saved - self.state["seconds"]

    def seconds(self) -> float:
        """Of this run, and of those before it until they saved last."""
        return time.monotonic() - self._began

    def open(self, name: str) -> BinaryIO:
        """A file that grows; what of it counts already stands in it."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        self._files[name] = self._open.enter_context((self.folder / name).open("a+b"))
        return self._files[name]

    def left(self, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """The (place, document) pairs that are not done."""
        number, crc, done = 0, 0, self.state["documents"]
        for number, (place, text) in enumerate(documents, 1):
            crc = crc32(text.encode("utf-8", "surrogatepass"), crc)
            if number > done:
                self._ahead.append(crc)
                yield place, text
            elif number == done and crc != self.state["crc"]:
                break
        else:
            if number >= done:
                return
        raise StateError("The sources no longer give the documents that the run began with.", "--fresh begins anew.")

    def done(self, counts: Callable[[], Any]) -> None:
        """What the next document gives is in the files and in `counts`."""
        self.documents, self._crc = self.documents + 1, self._ahead.popleft()
        if time.monotonic() - self._saved >= EVERY:
            self.save(counts())

    def save(self, counts: Any) -> None:
        for name, file in self._files.items():
            if not file.closed:
                file.flush()
                os.fsync(file.fileno())
            self.state["sizes"][name] = (self.folder / name).stat().st_size
        self._files = {name: file for name, file in self._files.items() if not file.closed}
        state = self.state | {"documents": self.documents, "crc": self._crc, "counts": plain(counts),
                              "seconds": self.seconds()}
        write_atomic(self.folder / PROGRESS, json.dumps({"crc": crc_of(state), "state": state}).encode())
        self._saved = time.monotonic()

    def close(self) -> None:
        self._open.close()  # what is buffered must not reach a file that a later run has cut

    def forget(self) -> None:
        """Going on would end the same way."""
        (self.folder / PROGRESS).unlink(missing_ok=True)


@contextmanager
def resumable(out: Path, identity: Mapping[str, Any], fresh: bool) -> Iterator[Work]:
    """The work on `out`, and what of it is done. identity: "verb", and all that the result depends on. The folder goes when
    the block ends well, and when nothing was saved. Raises StateError while another run holds it."""
    folder, finished = hidden_folder(out), False
    workspace = Workspace(folder, {"verb": identity["verb"]}, fresh=fresh)
    try:
        with closing(Work(folder, digests(identity), fresh)) as work:
            yield work
        finished = True
    except OSError as error:
        if disk_full(error):
            raise SupremumError(f"{out}: the disk is full.", "Free space and run the same command again.") from error
        if isinstance(error, PermissionError):
            raise SupremumError(f"{out}: cannot be written ({error.strerror}).", "Choose another --out.") from error
        raise
    finally:
        if finished or not (folder / PROGRESS).exists():
            workspace.discard()
        else:
            workspace.close()


def may_replace(out: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a run of this identity was begun with --fresh and cut off."""
    found = read_state(hidden_folder(out))
    return found is not None and bool(found["fresh"]) and found["identity"] == digests(identity)


def read_state(folder: Path) -> dict[str, Any] | None:
    """None without one, and where it or a file that it counts on is damaged."""
    try:
        found = json.loads((folder / PROGRESS).read_bytes())
        state: dict[str, Any] = found["state"]
        whole = found["crc"] == crc_of(state) and all(
            (folder / name).stat().st_size >= size for name, size in state["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return state if whole else None


def digests(identity: Mapping[str, Any]) -> dict[str, str]:
    """Of each part: a source may be a folder of a million files."""
    return {name: blake2b(json.dumps(plain(value)).encode(), digest_size=16).hexdigest() for name, value in identity.items()}


def crc_of(state: Any) -> int:
    return crc32(json.dumps(state).encode())


def hidden_folder(out: Path) -> Path:
    """Hidden, so that a source that is a folder may hold it."""
    return out.with_name(f".{out.name}.work")
