"""Crash-safe checkpoints: written beside, described by a manifest, moved into place; only a whole one is resumed.

    RUN/.part/checkpoint-N     what is being written; removed by the next start
    RUN/checkpoint-N           whole: manifest.json names every file with its size and sha256
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from ..errors import SupremumError
from ..progress import note
from ..workspace import write_atomic

PART, MANIFEST, PREFIX = ".part", "manifest.json", "checkpoint-"
KEEP = 2  # the one before last stays until the last is whole, and serves if that is damaged later


def seal(part: Path, run: Path) -> Path:
    """Describe the checkpoint `part`, flush it to the disk and move it into `run`; older ones beyond KEEP go."""
    write_atomic(part / MANIFEST, json.dumps(_described(part, flush=True), indent=1).encode())
    place = run / part.name
    shutil.rmtree(place, ignore_errors=True)
    os.replace(part, place)
    _flush(run)
    for old in checkpoints(run)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints in place, the newest first."""
    found = [p for p in run.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(place: Path | None) -> int:
    """The step after which a checkpoint was written; 0 without one."""
    return int(place.name.removeprefix(PREFIX)) if place else 0


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is what its manifest says, None without one; what is passed over is said.

    Raises SupremumError where checkpoints stand but none is whole: to begin again in silence would waste the run.
    """
    shutil.rmtree(run / PART, ignore_errors=True)
    found = checkpoints(run)
    for place in found:
        if not (wrong := damage(place)):
            return place
        note(f"{place}: is not resumed ({wrong}).")
    if found:
        raise SupremumError(f"{run}: holds {len(found)} checkpoints, and none is whole.", "--fresh begins again.")
    return None


def damage(place: Path) -> str:
    """What is wrong with a checkpoint; empty when it is whole."""
    try:
        wanted = json.loads((place / MANIFEST).read_text())
        found = _described(place)
    except (OSError, ValueError) as error:
        return f"no manifest: {error}" if isinstance(error, OSError) else "its manifest is damaged"
    if not isinstance(wanted, dict):
        return "its manifest is damaged"
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            state = "missing" if name not in found else "not in the manifest" if name not in wanted else "damaged"
            return f"{name} is {state}"
    return ""


def _described(folder: Path, *, flush: bool = False) -> dict[str, dict[str, int | str]]:
    out: dict[str, dict[str, int | str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            if flush:
                os.fsync(file.fileno())
        out[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return out


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
