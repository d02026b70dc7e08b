"""The rooms of CONTRIBUTING.md: every module stands in one, and none imports a lower one when it is loaded."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "supremum"


def floors() -> dict[str, int]:
    """Room or module -> its row of the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ((?:`[\w/]+`(?:, )?)+) \|", text[:text.index("`tests/` mirrors")], re.MULTILINE)
    return {name.rstrip("/"): row for row, cell in enumerate(rows) for name in re.findall(r"`([\w/]+)`", cell)}


def loaded(path: Path) -> Iterator[str]:
    """Rooms and modules that a file imports when it is loaded: not within functions, nor for types alone."""
    open_nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].relative_to(SOURCE)
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((base / name.replace(".", "/")).parts[0] for name in names)
        open_nodes += ast.iter_child_nodes(node)


def test_every_module_imports_its_own_room_and_those_above_it() -> None:
    floor = floors()
    assert len(set(floor.values())) > 10
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            assert room in floor, f"{room} is in no row of CONTRIBUTING.md"
            wrong += [f"{path}: {name}" for name in loaded(path) if floor.get(name, -1) > floor[room]]
    assert not wrong
