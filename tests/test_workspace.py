"""The run folder: whole files or none, one process at a time, one set of inputs."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch  # noqa: F401  before the fork: a child killed while it imports has written nothing
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from supremum.errors import StateError, SupremumError
from supremum.workspace import Workspace, replacing, write_atomic

INPUTS = {"model": "abc", "seed": 0, "options": {"size": 60_000_000, "keep": []}}


def content(step: int) -> dict[str, Tensor]:
    """What step number `step` computes: 0.8 MB that only it holds."""
    return {"x": torch.full((200_000,), float(step)), "step": torch.tensor(step)}


def in_child(function: Callable[[], None]) -> int:
    """Run `function` in another process (a fork: no imports to wait for); its process id."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def wait(child: int) -> int:
    """Exit status of the child; minus the signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_step_is_computed_once_and_read_back(tmp_path: Path) -> None:
    calls: list[str] = []

    def tensors() -> dict[str, Tensor]:
        calls.append("tensors")
        return {"z": torch.randn(3, 4).T, "a": torch.tensor([1.5], dtype=torch.bfloat16), "m": torch.arange(4)[::2]}

    def document() -> Any:
        calls.append("json")
        return {"kl": 0.1 + 0.2, "names": ("a", "b"), 1: None}

    first = Workspace(tmp_path / "work", INPUTS)
    made, read = first.tensors("deep/in/x.safetensors", tensors), first.json("y.json", document)
    assert list(made) == ["z", "a", "m"] == first.keys("deep/in/x.safetensors")  # the order of a step's result is kept
    assert read == {"kl": 0.1 + 0.2, "names": ["a", "b"], "1": None}
    first.close()
    second = Workspace(tmp_path / "work", INPUTS)
    again = second.tensors("deep/in/x.safetensors", tensors)
    assert calls == ["tensors", "json"] and second.json("y.json", document) == read
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in made.items())
    assert torch.equal(second.load("deep/in/x.safetensors", ["m"])["m"], torch.tensor([0, 2]))
    second.remove("deep/in/*.safetensors")
    assert not second.has("deep/in/x.safetensors") and second.has("y.json")
    second.discard()
    assert not (tmp_path / "work").exists()


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work", INPUTS)

    def fail() -> dict[str, Tensor]:
        raise ValueError("no")

    for step in (workspace.tensors, workspace.json):
        with pytest.raises(ValueError):
            step("x", fail)
    assert sorted(path.name for path in workspace.folder.iterdir()) == ["lock", "state.json"]


def test_killed_at_any_moment_leaves_whole_files_and_continues(tmp_path: Path) -> None:
    """kill -9 during writes: at 12 moments, most of them inside a write of some step."""
    folder, steps = tmp_path / "work", 400
    ready, begun = os.pipe()

    def run() -> None:
        torch.set_num_threads(1)  # a fork has none of its parent's threads: it would wait for them
        workspace = Workspace(folder, INPUTS)
        os.write(begun, b"!")
        for step in range(steps):
            workspace.tensors(f"{step % 4}/{step}.safetensors", lambda step=step: content(step))
            workspace.json(f"{step}.json", lambda step=step: {"step": step, "pad": "x" * 100_000})

    def whole() -> int:
        """Check every finished file; how many there are."""
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        for path in files:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                assert torch.equal(found["x"], content(int(path.stem))["x"]) and int(found["step"]) == int(path.stem)
            elif path.suffix == ".json" and path.stem != "state":
                assert json.loads(path.read_text())["step"] == int(path.stem)
        return len(files)

    draw, count, halves = torch.Generator().manual_seed(0), 0, 0
    for _ in range(12):
        child = in_child(run)
        os.read(ready, 1)
        time.sleep(0.1 * float(torch.rand((), generator=draw)))
        os.kill(child, signal.SIGKILL)
        assert wait(child) in (-signal.SIGKILL, 0)
        before, count = count, whole()
        halves += any(path for pattern in (".*.part", ".tmp*") for path in folder.rglob(pattern))
        assert count >= before  # what was finished stays
    assert halves > 0
    steps = count // 2 + 20
    child = in_child(run)
    assert wait(child) == 0 and whole() == max(2 * steps + 2, count)
    assert not [path for pattern in (".*.part", ".tmp*") for path in folder.rglob(pattern)]  # nothing left of killed writes


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    Workspace(tmp_path / "work", INPUTS).close()
    for name in (".x.safetensors.123.part", ".tmpAb12Cd"):  # ours, and the one that safetensors writes before it renames
        (tmp_path / "work" / name).write_bytes(b"half")
    workspace = Workspace(tmp_path / "work", INPUTS)
    assert sorted(path.name for path in workspace.folder.iterdir()) == ["lock", "state.json"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    ready, held = os.pipe()

    def hold() -> None:
        workspace = Workspace(folder, INPUTS)
        os.write(held, b"!")
        time.sleep(60)
        workspace.close()

    child = in_child(hold)
    assert os.read(ready, 1) == b"!"
    with pytest.raises(StateError, match="another run") as refused:
        Workspace(folder, INPUTS)
    assert str(folder) in refused.value.cause and refused.value.remedy
    with pytest.raises(StateError, match="another run"):
        Workspace(folder, INPUTS, fresh=True)
    assert (folder / "state.json").exists()
    os.kill(child, signal.SIGKILL)
    wait(child)
    workspace = Workspace(folder, INPUTS)  # the lock went with its process
    with pytest.raises(StateError, match="another run"):
        Workspace(folder, INPUTS)
    workspace.close()
    Workspace(folder, INPUTS).close()


@pytest.mark.parametrize(("change", "named"), [
    ({"model": "abd"}, "model"), ({"seed": 1}, "seed"), ({"options": {"size": 1, "keep": []}}, "options"),
    ({"text": ["a.txt"]}, "text")])
def test_state_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    folder = tmp_path / "work"
    first = Workspace(folder, INPUTS)
    first.json("step.json", lambda: "old")
    first.close()
    with pytest.raises(StateError) as refused:
        Workspace(folder, INPUTS | change)
    assert str(folder) in refused.value.cause and f"({named} changed" in refused.value.cause
    assert "--fresh" in refused.value.remedy
    kept = Workspace(folder, INPUTS)  # refusing has released the lock and changed nothing
    assert kept.json("step.json", lambda: "new") == "old"
    kept.close()
    fresh = Workspace(folder, INPUTS | change, fresh=True)
    assert fresh.json("step.json", lambda: "new") == "new"
    fresh.close()
    with pytest.raises(StateError, match=f"{named} changed"):
        Workspace(folder, INPUTS)


def test_inputs_are_compared_as_json_holds_them(tmp_path: Path) -> None:
    Workspace(tmp_path / "work", {"keep": ("a", "b"), "path": Path("x")}).close()
    Workspace(tmp_path / "work", {"path": "x", "keep": ["a", "b"]}).close()


def test_missing_keys_are_named_too(tmp_path: Path) -> None:
    Workspace(tmp_path / "work", {"a": 1, "b": 2}).close()
    with pytest.raises(StateError, match=r"b changed; b was 2, is null"):
        Workspace(tmp_path / "work", {"a": 1})


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\x00\xfe", b"[1]", b"null", b'"abc"'])
def test_damaged_state_is_refused(tmp_path: Path, damage: bytes) -> None:
    folder = tmp_path / "work"
    Workspace(folder, INPUTS).close()
    (folder / "state.json").write_bytes(damage)
    with pytest.raises(StateError, match=r"state\.json: is damaged.*--fresh"):
        Workspace(folder, INPUTS)
    Workspace(folder, INPUTS, fresh=True).close()
    Workspace(folder, INPUTS).close()


def test_steps_without_their_state_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    first = Workspace(folder, INPUTS)
    first.json("step.json", lambda: "old")
    first.close()
    (folder / "state.json").unlink()
    with pytest.raises(StateError, match=r"no state\.json"):
        Workspace(folder, INPUTS | {"model": "other"})
    assert Workspace(folder, INPUTS, fresh=True).json("step.json", lambda: "new") == "new"


def test_discarding_is_safe_to_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `fresh` that is killed half-way must not leave old steps that the next run takes for its own."""
    folder = tmp_path / "work"
    first = Workspace(folder, INPUTS)
    for name in ("a.json", "z.json", "deep/step.json"):
        first.json(name, lambda: "old")
    first.close()
    count, unlink = 0, Path.unlink

    def dying(path: Path, missing_ok: bool = False) -> None:
        nonlocal count
        if path.suffix == ".json":
            count += 1
            if count == 2:
                raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        Workspace(folder, INPUTS | {"model": "other"}, fresh=True)
    monkeypatch.undo()
    with pytest.raises(StateError, match="model changed"):
        Workspace(folder, INPUTS | {"model": "other"})


def test_a_stranger_s_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "photos.work"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"dear")
    for fresh in (False, True):
        with pytest.raises(StateError, match="is no state of a run"):
            Workspace(folder, INPUTS, fresh=fresh)
    assert [path.name for path in folder.iterdir()] == ["photo.jpg"]
    file = tmp_path / "file"
    file.write_bytes(b"")
    for place in (file, file / "work"):
        with pytest.raises(StateError, match="cannot be written"):
            Workspace(place, INPUTS)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, full = tmp_path / "x.json", OSError(errno.ENOSPC, "No space left on device")
    write_atomic(path, b"old")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise full

    for place, name in ((Path, "write_bytes"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refuse)
            with pytest.raises(SupremumError, match=r"x\.json: the disk is full.*run the same command again"):
                write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    full.errno = errno.EACCES  # another failure is not called a full disk
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", refuse)
        write_atomic(path, b"new")


def test_a_full_disk_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reports it in its own exception, in words (seen on a full tmpfs with safetensors 0.8)."""
    workspace = Workspace(tmp_path / "work", INPUTS)
    workspace.save("x.safetensors", content(1))
    for words, expected in (("I/O error: No space left on device (os error 28)", SupremumError),
                            ("I/O error: Disk quota exceeded (os error 122)", SupremumError),
                            ("I/O error: Permission denied (os error 13)", SafetensorError)):
        def refuse(*args: Any, words: str = words) -> None:
            raise SafetensorError(f"Error while serializing: {words}")

        monkeypatch.setattr("safetensors.torch.save_file", refuse)
        with pytest.raises(expected):
            workspace.save("x.safetensors", content(2))
    assert int(workspace.load("x.safetensors")["step"]) == 1


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists() and temporary.parent == path.parent  # one file system: the move is one operation
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with replacing(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and [p.name for p in path.parent.iterdir()] == ["file"]
