"""`supremum text clean|tokenizer|pack|augment`: from raw text to what a model is trained on."""

from __future__ import annotations

import json
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Debug, Json, Result, Seed, size_option, verb

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
Fresh = Annotated[bool, typer.Option("--fresh", help="Replace what stands there; begin anew.")]


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
""", resumable=True)
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

    The report is written beside the output (clean.jsonl: clean.report.json). A
    run that is stopped or killed goes on with the same command.
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
    from ..text.sources import bytes_of
    from ..text.tables import fertility_table

    bytes_of(sources)  # they exist, before a model is opened
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
""", resumable=True)
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

    The tokenizer is kept in the folder. The order is the sources'; reading
    shuffles, by a seed, and can be resumed. A run that is stopped or killed goes
    on with the same command.
    """
    from rich.console import Console

    from ..plain import plain
    from ..text import Reading
    from ..text import pack as run
    from ..text.tables import pack_lines

    done = run(sources, tokenizer, out, shard=shard, workers=workers, reading=Reading(field, unit.value), strict=strict,
               fresh=fresh)
    return plain(done), lambda: Console().print(pack_lines(done))


@text.command()
@verb("""
    supremum text augment train.jsonl --swap 0.1 --delete 0.1 --out more.jsonl
    supremum text augment a.jsonl --synonyms 0.1 --model demo --out b.jsonl
    supremum text augment a.jsonl --back-translation mt.py:back --out b.jsonl
""")
def augment(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Output: .jsonl, .txt.")],
    mask: Annotated[float, typer.Option("--mask", help="Probability that a word is masked.")] = 0.0,
    delete: Annotated[float, typer.Option("--delete", help="Probability that a word falls.")] = 0.0,
    swap: Annotated[float, typer.Option("--swap", help="Swaps of neighbouring words, a word.")] = 0.0,
    synonyms: Annotated[float, typer.Option("--synonyms", help="Probability that a word becomes a neighbour of it in the "
                                                               "embedding of --model.")] = 0.0,
    mix: Annotated[float, typer.Option("--mix", help="Probability that a copy goes on with another document's end.")] = 0.0,
    back: Annotated[str | None, typer.Option("--back-translation", metavar="FILE.py:FUNCTION",
                                             help="Your function: a list of texts in, as many out.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Whose embedding gives the synonyms.")] = None,
    mask_token: Annotated[str, typer.Option("--mask-token", help="What masked words become.")] = "<mask>",
    copies: Annotated[int, typer.Option("--copies", min=1, help="Changed copies of each document.")] = 1,
    originals: Annotated[bool, typer.Option("--originals/--no-originals", help="Write the documents, too.")] = True,
    field: FieldName = "text",
    unit: UnitOf = Unit.document,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Add changed copies of each document. Everything is off unless named; the same seed gives the same bytes."""
    shares = {"mask": mask, "delete": delete, "swap": swap, "synonyms": synonyms, "mix": mix}
    if not any(shares.values()) and back is None:
        raise typer.BadParameter("name a change: --mask, --delete, --swap, --synonyms, --mix or --back-translation")
    if wrong := next((name for name, share in shares.items() if not 0 <= share <= 1), None):
        raise typer.BadParameter(f"--{wrong} {shares[wrong]:g} is no probability")
    if bool(synonyms) != (model is not None):
        raise typer.BadParameter("--synonyms and --model go together")

    from rich.console import Console

    from ..plain import plain
    from ..text import Reading, augment_text
    from ..text.augmentation import Changes, function_named, neighbours_of
    from ..text.cleaning import check_file
    from ..text.tables import augmented_table

    check_file(out, sources, fresh)  # before a model is loaded
    done = augment_text(sources, out, Changes(**shares), copies=copies, originals=originals, mask_token=mask_token, seed=seed,
                        neighbours=neighbours_of(model) if model else None, fresh=fresh,
                        back_translate=function_named(back) if back else None, reading=Reading(field, unit.value))
    return plain(done), lambda: Console().print(augmented_table(done))


def report_file(out: Path) -> Path:
    """clean.jsonl.gz: clean.report.json."""
    name = out.name.removesuffix(".gz")
    return out.with_name(name.rsplit(".", 1)[0] + ".report.json")
