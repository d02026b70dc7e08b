"""What every verb shares: options, the exit codes, and standard output kept for the result alone."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..checkpoint import targets
from ..errors import SupremumError
from ..plain import plain
from ..report.words import one_line
from ..sizes import parse_size

FAILED, INTERRUPTED = 1, 130
KEPT = "Finished steps are kept; the same command (without --fresh) resumes."

Document = Mapping[str, Any]
Result = tuple[Document, Callable[[], Any]]  # what --json prints, and what prints the same for a person


class Precision(str, Enum):
    """Number type of the forward passes; sums are always kept in float32 or better."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def size_option(text: str) -> int:
    """`parse_size` for the command line: wrong input is wrong usage (exit 2)."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def speed_option(text: str) -> str:
    """"2x" or "150", looked at; wrong input is wrong usage (exit 2)."""
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?x?", text):
        raise typer.BadParameter(f"{text!r} is no speed; write it like 2x (times the original's) or 150 (tokens/s)")
    return text


def floor_option(text: str) -> str:
    """"accuracy=0.99x" or "accuracy=0.86", looked at; wrong input is wrong usage (exit 2)."""
    found = re.fullmatch(r"[A-Za-z][\w-]*=(?=[\d.]*[1-9])(\d+(?:\.\d*)?|\.\d+)(x?)", text.strip())
    if not found or (found[2] and float(found[1]) > 1):
        raise typer.BadParameter(f"{text!r} is no floor; write accuracy=0.99x (times the original's) or accuracy=0.86")
    return text.strip()


def target_option(verb: str, without: str = "") -> Any:
    """--target of this verb; the name of no such target is wrong usage (exit 2). without: what happens if there is none."""
    names = ", ".join(targets.names(verb))

    def parse(text: str) -> str:
        if text not in targets.names(verb):
            raise typer.BadParameter(f"{text!r} is not one of {names}")
        return text

    return typer.Option("--target", parser=parse, metavar="TARGET", help=(
        f"Format and the runtime that reads it: {names}.{without}"))


def text_option(without: str) -> Any:
    """--text; `without`: what happens if there is none."""
    return typer.Option("--text", metavar="SOURCE", help=(
        f"Text file (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet), folder of such files, or hub dataset id; repeatable. "
        f"{without} An encoder-decoder takes pairs: two files of lines a.en,a.de, or rows of a source and a target (.jsonl); "
        "without them the rows that it was tuned on; of other text it writes what belongs to each line."))


def page_option(what: str) -> Any:
    """--page; a file that could not be written is wrong usage (exit 2)."""
    def parse(text: str) -> Path:
        page = Path(text)
        if page.suffix.lower() not in (".html", ".htm") or not page.absolute().parent.is_dir():
            raise typer.BadParameter(f"{text}: give a file that ends in .html, in a folder that exists")
        return page

    return typer.Option("--page", parser=parse, metavar="FILE", help=what)


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Wrong usage (exit 2) if any of these options has a value that counts."""
    if found := next((name for name, value in given.items() if value), None):
        raise typer.BadParameter(f"{found} {why}")


Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="A Hugging Face folder or hub id, a .gguf file, a Supremum output folder, `demo` or `minilm`.")]
Text = Annotated[list[str] | None, text_option("Without it the model writes its own text.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random; same inputs, same bytes.")]
Dtype = Annotated[Precision, typer.Option(
    "--dtype", help="Number type of the forward passes; auto is bfloat16 where the processor multiplies in it (float32 in "
                    "`evaluate`).")]
Recipe = Annotated[Path, typer.Argument(
    metavar="RECIPE.yaml", help="What to do; see examples/, docs/train.md and docs/tune.md.")]
Files = Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder that the recipe's paths begin in.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder; by default the recipe's name.")]
Changes = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="Another value for a key of the recipe (optimiser.lr=1e-4); repeatable.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin again, discarding an earlier run or result.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", envvar="SUPREMUM_DEBUG", help="Show tracebacks and library warnings.")]


def quiet_libraries() -> None:
    """Silence what the libraries print about themselves; SUPREMUM_DEBUG=1 lets it through. Telemetry stays off."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if os.environ.get("SUPREMUM_DEBUG", "0") not in ("", "0"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


def verb(examples: str, *, resumable: bool = False) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a command of a function that returns `Result`: help with examples, output, and errors as exit codes."""

    def wrap(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**options: Any) -> None:
            as_json, debug = options["as_json"], options["debug"]
            try:
                with stdout_for_result():
                    document, show = function(**options)
            except SupremumError as error:
                _fail(error.cause, error.remedy, as_json, debug)
            except KeyboardInterrupt:
                print(f"supremum: interrupted. {KEPT if resumable else 'Run it again.'}", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None
            except MemoryError:
                _fail("The machine ran out of memory.", "Close other programs, or lower --tokens.", as_json, debug)
            except Exception as error:
                if isinstance(error, typer.Exit | typer.Abort | typer.BadParameter):
                    raise
                _fail(f"internal error: {type(error).__name__}: {error}",
                      "Please report it with the traceback that --debug shows.", as_json, debug)
            if as_json:
                print(to_json(document))
            else:
                show()

        command.__doc__ = f"{inspect.getdoc(function)}\n\nExamples:\n\n\b\n" + "\n".join(
            f"  {line.strip()}" for line in examples.strip().splitlines())
        return command

    return wrap


def to_json(document: Document) -> str:
    """`document` as strict JSON: what is not a finite number becomes null."""
    return json.dumps(plain(document), indent=2, allow_nan=False, default=str)


@contextlib.contextmanager
def stdout_for_result() -> Iterator[None]:
    """Within the block, whatever libraries print to standard output (from C, too) goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            sys.__stdout__.flush()  # type: ignore[union-attr]
            saved = os.dup(1)
            os.dup2(2, 1)
        except (OSError, ValueError, AttributeError):  # closed or replaced streams: nothing to protect
            yield
            return
        try:
            yield
        finally:
            sys.__stdout__.flush()  # type: ignore[union-attr]
            os.dup2(saved, 1)
            os.close(saved)


def _fail(cause: str, remedy: str, as_json: bool, debug: bool) -> NoReturn:
    """Report a failure in one line on standard error (and as a document, when asked for) and exit with 1."""
    if debug:
        traceback.print_exc()
    print(f"supremum: error: {one_line(cause)} {one_line(remedy)}".rstrip(), file=sys.stderr)
    if as_json:
        print(to_json({"error": {"cause": cause, "remedy": remedy}}))
    raise typer.Exit(FAILED) from None

