"""The report of a run: supremum.json, and the page, the model card and the closing table that are drawn from it."""

from __future__ import annotations

from pathlib import Path

from .document import FILE, SCHEMA, Document, encode, read_document, validate


def write_report(document: Document, folder: Path) -> Path:
    """Write supremum.json, report.html and README.md into `folder`; returns the page's path.

    Raises StateError when `document` does not follow the schema.
    """
    from ..workspace import write_atomic
    from .card import card
    from .html import page

    write_atomic(folder / FILE, encode(document))
    write_atomic(folder / "README.md", card(document).encode())
    write_atomic(folder / "report.html", page(document).encode())
    return folder / "report.html"


__all__ = ["FILE", "SCHEMA", "Document", "encode", "read_document", "validate", "write_report"]
