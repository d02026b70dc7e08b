"""What a job leaves for the next one in the same work folder."""

from __future__ import annotations

from pathlib import Path

import torch

from supremum.gather import fit_leftovers
from supremum.workspace import Workspace

FILES = ("candidates/0000.safetensors", "prices/0000.json", "fisher/0000.safetensors")


def left(workspace: Workspace) -> list[str]:
    return [file for file in FILES if workspace.has(file)]


def test_candidates_and_prices_are_kept_for_the_same_menu_alone(tmp_path: Path) -> None:
    """The statistics serve every menu."""
    workspace, menu = Workspace(tmp_path / "work", {}), {"a": ["Q4_0", "Q8_0"], "b": []}
    fit_leftovers(workspace, menu)
    for file in FILES:
        if file.endswith(".json"):
            workspace.json(file, dict)
        else:
            workspace.save(file, {"x": torch.zeros(1)})
    fit_leftovers(workspace, menu)
    assert left(workspace) == list(FILES)
    fit_leftovers(workspace, {"a": ["Q8_0"], "b": []})
    assert left(workspace) == ["fisher/0000.safetensors"]


def test_a_kill_while_they_go_leaves_none_behind(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work", {})
    fit_leftovers(workspace, {"a": ["Q4_0"]})
    workspace.save(FILES[0], {"x": torch.zeros(1)})
    workspace.path("menu.json").write_text("null")  # as a kill between the two writes leaves it
    fit_leftovers(workspace, {"a": ["Q4_0"]})
    assert left(workspace) == []
