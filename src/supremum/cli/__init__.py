"""The command line: `supremum VERB ...`, one module a verb; a thin skin over the Python API.

Standard output carries the result alone (a table, or one JSON document with --json); progress and logs go to standard
error. Exit codes: 0 done, 1 failed (one line: cause and remedy), 2 wrong usage, 130 interrupted and resumable.
Nothing here imports torch before a verb runs, so that help appears at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from .bare import BareFrontier, BareScaling
from .common import INTERRUPTED, quiet_libraries
from .convert import convert
from .doctor import doctor
from .evaluate import evaluate
from .limit import limit
from .optimize import optimize
from .report import report
from .text import text
from .train import train
from .tune import tune

app = typer.Typer(name="supremum", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="The best a language model can do on this machine within a budget: measured, reached, proved.",
                  epilog="Start here:  supremum optimize demo --size 75MB --tokens 4096 --out small")

for verb in (limit, optimize, evaluate, convert, train, tune, report, doctor):
    app.command(no_args_is_help=False, cls={"optimize": BareFrontier, "limit": BareScaling}.get(verb.__name__))(verb)

app.add_typer(text)


def _version(value: bool) -> None:
    if value:
        print(f"supremum {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                   help="Show the version and exit.")] = False) -> None:
    pass


def main() -> None:
    """The console script."""
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" instead of failing
    try:
        app(prog_name="supremum")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
