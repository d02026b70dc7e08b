"""Checks that come before anything in a model folder is believed.

A folder may come from anywhere. Before its bytes are parsed: only regular files inside the folder are read (no `..`, no
absolute names, no links that lead out of it, except the hub cache's own links to its blobs), JSON is strict (duplicate
keys refused, size bounded), weights are safetensors (pickles execute code), and no code of the folder's own is run.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import transformers

from ..errors import CheckpointError

MAX_JSON = 512 << 20  # bytes; the largest tokenizer.json known is about 35 MB
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
LFS_MARK = b"version https://git-lfs.github.com/spec/"


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises CheckpointError when the name leads outside or is not a regular file."""
    pure = PurePosixPath(name)
    if (
        not name
        or "\0" in name
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in name
        or PureWindowsPath(name).is_absolute()
        or PureWindowsPath(name).drive
    ):
        raise CheckpointError(
            f"{folder}: the file name {name!r} points outside the folder.",
            "Do not use this model; its index has been tampered with.",
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be opened ({_reason(error)}).", "Download the model again, with all of its files."
        ) from error
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise CheckpointError(
            f"{path}: is a link that leads outside the folder, to {real}.",
            "Copy the file into the folder if you trust it.",
        )
    return regular(path)


def _roots(folder: Path) -> list[Path]:
    """Where a folder's files may really lie: in it, or in the blobs of its own hub cache entry."""
    real = folder.resolve()
    roots = [real]
    if real.parent.name == "snapshots":  # models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>
        roots.append(real.parent.parent / "blobs")
    return roots


def regular(path: Path) -> Path:
    """`path`, when it is a regular file with content that is not a Git-LFS pointer."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({_reason(error)}).", "Check the path.") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            f"{path}: is not a regular file.", "Give a real file; pipes, devices and folders are not read."
        )
    if status.st_size == 0:
        raise CheckpointError(f"{path}: is empty.", "Download it again.")
    with path.open("rb") as file:
        if file.read(len(LFS_MARK)) == LFS_MARK:
            raise CheckpointError(
                f"{path}: is a Git-LFS pointer, not the file itself.", "Run `git lfs pull` in the model's folder."
            )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; duplicate keys, other JSON types and broken text are refused."""
    regular(path)
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(
            f"{path}: is larger than {MAX_JSON >> 20} MiB, which no JSON file of a model is.", "Download it again."
        )
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)}).", "Check its permissions.") from error


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes, strictly: UTF-8, no duplicate keys, bounded nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise CheckpointError(
                    f"{where}: the key {key!r} appears twice.", "Download it again or repair the file."
                )
            keys[key] = value
        return keys

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: is not valid JSON ({error}).", "It is truncated or damaged; download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, not an object.", "Download it again.")
    return value


def refuse_code(path: Path, settings: dict[str, Any]) -> None:
    """Refuse a config that asks for Python from its own folder.

    `auto_map` that merely repeats classes which Transformers has by now (Phi-3's files do) is allowed: the installed
    classes are used, nothing is downloaded or executed.
    """
    auto_map = settings.get("auto_map")
    if not auto_map:
        return
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    classes: list[str] = []
    for value in values:
        classes += [str(v) for v in value if v] if isinstance(value, (list, tuple)) else [str(value)]
    foreign = [c for c in classes if "--" in c or getattr(transformers, c.rpartition(".")[2], None) is None]
    if foreign:
        raise CheckpointError(
            f"{path}: `auto_map` asks to run the model's own code ({foreign[0]}).",
            "Supremum never runs remote code. Use a model whose architecture Transformers has.",
        )


def refuse_pickles(folder: Path, names: Iterable[str]) -> None:
    """Raise for a folder whose weights come only in a format that can execute code."""
    pickles = sorted(n for n in names if n.endswith(PICKLES) and not n.startswith(("training_args", "optimizer")))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: the weights are a pickle or the like, which can run code.",
            "Get the safetensors version, or convert a file that you trust with save_pretrained.",
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
