"""`supremum report`: render a run's supremum.json again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, Json, Result, verb


@verb("""
    supremum report small
    supremum report small --json
""")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run, or a file in it.")],
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Show a finished run again and rewrite its report.html and README.md from supremum.json; of a frontier, its page."""
    from ..errors import SupremumError
    from ..report import read_document, write_report
    from ..report.frontier import FILE, read_frontier, show_frontier, write_frontier
    from ..report.terminal import show_result

    if not folder.exists():
        raise SupremumError(f"{folder}: does not exist.", "Give the folder that a run was written to.")
    if folder.is_file():
        folder = folder.parent
    if (folder / FILE).exists():
        frontier = read_frontier(folder)
        write_frontier(frontier, folder)
        return frontier, lambda: show_frontier(frontier, folder)
    document = read_document(folder)
    write_report(document, folder)
    return document, lambda: show_result(document, folder)
