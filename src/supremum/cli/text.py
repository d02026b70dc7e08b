"""`supremum text clean|tokenizer|pack|augment`: from raw text to what a model is trained on."""

from __future__ import annotations

import json
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Debug, Json, Result, size_option, verb

text = typer.Typer(name="text", no_args_is_help=True, rich_markup_mode="rich",
                   help="From raw text to what a model is trained on: clean it, train a tokenizer, pack tokens, augment.")


class Html(str, Enum):
    auto = "auto"
    always = "always"
    never = "never"


class Form(str, Enum):
    NFC = "NFC"
    NFKC = "NFKC"
    NFD = "NFD"
    NFKD = "NFKD"
    none = "none"


class Kind(str, Enum):
    bpe = "bpe"
    wordpiece = "wordpiece"
    unigram = "unigram"


class Bytes(str, Enum):
    level = "level"
    fallback = "fallback"
    none = "none"


class Unit(str, Enum):
    document = "document"
    paragraph = "paragraph"
    line = "line"


Sources = Annotated[list[str], typer.Argument(
    metavar="SOURCE", help="Files (.txt, .md, .jsonl, .json, .csv, .tsv, also .gz; .parquet), folders of them, or hub "
                              "datasets (owner/name[:config][:split]).")]
FieldName = Annotated[str, typer.Option("--field", metavar="NAME", help="The column or key that holds the document.")]
UnitOf = Annotated[Unit, typer.Option("--unit", help="What of a plain text file is one document.")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes; as many as processors by default.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first record that cannot be read.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Replace what stands there.")]


def names_option(module: str, name: str) -> Any:
    """A parser of a list such as "en,zh" of the names that a module of `text` knows, or "none"; others are wrong usage
    (exit 2). The module is read when the option is used."""
    def parse(value: Any) -> tuple[str, ...]:
        known = getattr(import_module(f"supremum.text.{module}"), name)
        names = tuple(each.strip() for each in value.split(",") if each.strip()) if value != "none" else ()
        if strange := [each for each in names if each not in known]:
            raise typer.BadParameter(f"{strange[0]!r} is not one of {', '.join(known)}")
        return names
    return parse


def similarity_option(value: float) -> float:
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{value:g} is no similarity; write it like 0.8, or 0 for none")
    return value


@text.command()
@verb("""
    supremum text clean raw/ --out clean.jsonl
    supremum text clean a.csv --field review --language en,zh --out c.jsonl
    supremum text clean a.txt --unit line --near 0.7 --quality c4 --out c.txt
    supremum text clean a.jsonl --against b.jsonl --drop-leaks --out c.jsonl
""")
def clean(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Output: .jsonl, .jsonl.gz or .txt.")],
    field: FieldName = "text",
    unit: UnitOf = Unit.document,
    html: Annotated[Html, typer.Option("--html", help="Take markup off what looks like a page, always, never.")] = Html.auto,
    form: Annotated[Form, typer.Option("--form", help="Unicode normal form.")] = Form.NFC,
    language: Annotated[Any, typer.Option("--language", parser=names_option("language", "LANGUAGES"), metavar="CODES",
                                          help="Keep these languages only, such as en,zh.")] = "none",
    quality: Annotated[Any, typer.Option("--quality", parser=names_option("quality", "RULES"), metavar="RULES",
                                         help="Of gopher, repetition, c4: published rules for prose.")] = "none",
    exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Drop documents that repeat an earlier one.")] = True,
    near: Annotated[float, typer.Option("--near", callback=similarity_option, metavar="J",
                                        help="Drop documents whose 5-word runs have this Jaccard similarity with an earlier "
                                             "one's; 0: none.")] = 0.8,
    pii: Annotated[Any, typer.Option("--pii", parser=names_option("pii", "KINDS"), metavar="KINDS",
                                     help="Mask email, iban, card, ip, phone; or none.")] = "email,iban,card,ip,phone",
    against: Annotated[list[str] | None, typer.Option(
        "--against", metavar="SOURCE", help="Evaluation text: say which of its documents stand in the sources; repeatable. "
                                            "Plain text is taken by paragraphs, with --unit line by "
                                            "lines.")] = None,
    against_field: Annotated[str | None, typer.Option("--against-field", metavar="NAME",
                                                      help="The evaluation text's --field, where it is another.")] = None,
    run: Annotated[int, typer.Option("--run", min=5, help="Words in a row that are a leak.")] = 13,
    drop_leaks: Annotated[bool, typer.Option("--drop-leaks", help="Drop the documents that hold a leak.")] = False,
    strict: Strict = False,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Clean text: markup, characters, languages, quality, leaks, personal data, duplicates; counts and samples of each.

    The report is written beside the output (clean.jsonl: clean.report.json). Nothing is left of an interrupted run.
    """
    if drop_leaks and not against:
        raise typer.BadParameter("--drop-leaks needs the evaluation text: --against FILE")

    from rich.console import Console

    from ..plain import plain
    from ..text import Reading, clean_text
    from ..text.steps import Rules
    from ..text.tables import clean_table
    from ..workspace import write_atomic

    rules = Rules(html=html.value, form=form.value, languages=language, quality=quality, drop_leaks=drop_leaks, pii=pii)
    found = clean_text(sources, out, rules=rules, exact=exact, near=near or None, against=against or (),
                       against_field=against_field, run=run, workers=workers,
                       reading=Reading(field=field, unit=unit.value), strict=strict, fresh=fresh)
    document = plain(found)
    write_atomic(report_file(out), json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode())
    return document, lambda: Console().print(clean_table(found))


@text.command()
@verb("""
    supremum text tokenizer clean.jsonl --vocabulary 32000 --out tok
    supremum text tokenizer a.txt --kind unigram --vocabulary 16000 --out tok
    supremum text tokenizer en.txt --kind wordpiece --lowercase --out tok
    supremum text tokenizer held-out.txt --measure demo --json
""")
def tokenizer(
    sources: Sources,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder, for AutoTokenizer.")] = None,
    measure: Annotated[str | None, typer.Option(
        "--measure", metavar="MODEL", help="Train nothing: report how MODEL's tokenizer suits the sources.")] = None,
    kind: Annotated[Kind, typer.Option("--kind", help="How pieces are found.")] = Kind.bpe,
    vocabulary: Annotated[int, typer.Option("--vocabulary", min=300, help="Tokens, special and byte ones included.")] = 32000,
    bytes_as: Annotated[Bytes | None, typer.Option(
        "--bytes", help="Text as bytes (level), bytes for what the vocabulary lacks (fallback), unknown tokens (none). bpe: "
                        "level, unigram: fallback, wordpiece: none, unless given.")] = None,
    lowercase: Annotated[bool, typer.Option("--lowercase", help="Lower-case the text.")] = False,
    special: Annotated[list[str] | None, typer.Option(
        "--special", metavar="TOKEN", help="A token that is never split, such as <|im_start|>; repeatable.")] = None,
    most: Annotated[int, typer.Option("--most", parser=size_option, metavar="SIZE",
                                      help="Characters that are trained on at most.")] = "1GB",  # type: ignore[assignment]
    field: FieldName = "text",
    fresh: Fresh = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Train a tokenizer, and report its fertility and coverage in each language of the text.

    Every twentieth piece of the text is kept from training, for the report.
    """
    if (out is None) == (measure is None):
        raise typer.BadParameter("give either --out DIR or --measure MODEL")

    from rich.console import Console

    from ..text import Reading, load_text, tokenizer_report, train_tokenizer
    from ..text.packing import tokenizer_named
    from ..text.tables import fertility_table

    if measure is not None:
        found = tokenizer_report(tokenizer_named(measure), load_text(sources, Reading(field)))
    else:
        assert out is not None
        found = train_tokenizer(sources, out, kind=kind.value, vocabulary=vocabulary, lowercase=lowercase,
                                bytes_as=bytes_as.value if bytes_as else None, special=special or (), most=most,
                                reading=Reading(field), fresh=fresh)
    return found.document(), lambda: Console().print(fertility_table(found))


@text.command()
@verb("""
    supremum text pack clean.jsonl --tokenizer tok --out packed
    supremum text pack a.txt --unit line --tokenizer demo --out packed
""")
def pack(
    sources: Sources,
    tokenizer: Annotated[str, typer.Option("--tokenizer", metavar="MODEL", help="A folder with a tokenizer, or a model.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")],
    shard: Annotated[int, typer.Option("--shard", min=1, metavar="TOKENS", help="Tokens in a file.")] = 1 << 26,
    field: FieldName = "text",
    unit: UnitOf = Unit.document,
    strict: Strict = False,
    workers: Workers = None,
    fresh: Fresh = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Turn text into memory-mapped shards of tokens with document boundaries; training reads them with PackedTokens.

    The tokenizer is kept in the folder. The order is the sources'; reading shuffles, by a seed, and can be resumed.
    """
    from rich.console import Console

    from ..plain import plain
    from ..text import Reading
    from ..text import pack as run
    from ..text.tables import pack_lines

    done = run(sources, tokenizer, out, shard=shard, workers=workers, reading=Reading(field, unit.value), strict=strict,
               fresh=fresh)
    return plain(done), lambda: Console().print(pack_lines(done))


def report_file(out: Path) -> Path:
    """clean.jsonl.gz: clean.report.json."""
    name = out.name.removesuffix(".gz")
    return out.with_name(name.rsplit(".", 1)[0] + ".report.json")
