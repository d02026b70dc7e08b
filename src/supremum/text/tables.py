"""What the text verbs found, for a person: tables whose cells are plain text, never markup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .augmentation import Augmented
    from .cleaning import CleanReport
    from .fertility import Fertility
    from .packing import Packing

SHOWN = 2  # samples a step


def table(title: str, columns: dict[str, bool], rows: list[list[Any]]) -> Table:
    """`columns`: their heads, and whether they hold numbers."""
    made = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name, number in columns.items():
        made.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    return made


def clean_table(report: CleanReport) -> Group:
    speed = f", {report.bytes / 1e6 / report.seconds:.2f} MB/s" if report.bytes and report.seconds else ""
    title = (f"{report.read:,} documents read, {report.kept:,} kept; {report.characters_read:,} characters, "
             f"{report.characters_kept:,} kept ({report.seconds:.1f} s{speed})")
    parts: list[Any] = [table(title, {"step": False, "dropped": True, "changed": True, "what": False}, [
        [name, step.dropped, step.changed, ", ".join(f"{kind} {count:,}" for kind, count in step.counts.most_common(8))]
        for name, step in report.steps.items()])]
    samples = [[name, sample["kind"], line(f"{sample['place'].rsplit('/', 1)[-1]}: {sample['before']}"),
                line(sample["after"])]
               for name, step in report.steps.items() for sample in step.samples[:SHOWN]]
    if samples:
        parts += ["", table("Samples (more in the report)",
                            {"step": False, "kind": False, "met": False, "became": False}, samples)]
    if report.leaks:
        found = report.leaks
        parts += ["", Text(
            f"Evaluation text: {found.leaked} of {found.evaluation} documents share a run of {found.n} words with "
            f"{found.carriers} training documents ({found.whole} are there whole, {100 * found.share:.2f} % of all runs; "
            f"{found.short} too short to look for).")]
        if found.documents:
            parts.append(table("", {"leaked": False, "share": True, "begins": False}, [
                [one["place"], f"{100 * one['share']:.1f} %", line(one["opening"])] for one in found.documents[:5]]))
    return Group(*parts, "", Text(f"Written: {report.out}"))


def fertility_table(report: Fertility) -> Group:
    rows = []
    for code, suits in list(report.languages.items())[:12]:
        ratios = suits.ratios()
        rows.append([code, suits.documents, suits.characters, f"{ratios['tokens_per_word']:.3f}",
                     f"{ratios['tokens_per_character']:.3f}", f"{ratios['bytes_per_token']:.2f}",
                     f"{100 * ratios['coverage']:.2f} %", f"{100 * ratios['unknown']:.2f} %",
                     f"{100 * ratios['exact']:.1f} %"])
    shown = table(f"A vocabulary of {report.size:,}" + ", on text held out of training" * bool(report.out),
                  {"lang": False, "docs": True, "chars": True, "tok/word": True, "tok/char": True, "bytes/tok": True,
                   "covered": True, "unknown": True, "exact": True}, rows)
    return Group(shown, "", Text(f"Written: {report.out}")) if report.out else Group(shown)


def pack_lines(done: Packing) -> Text:
    speed = f", {done.characters / 1e6 / done.seconds:.2f} M characters/s" if done.seconds else ""
    text = (f"{done.documents:,} documents, {done.characters:,} characters -> {done.tokens:,} tokens ({done.dtype}) in "
            f"{done.shards} shard{'s' * (done.shards != 1)}; {done.unknown:,} unknown ({done.seconds:.1f} s{speed})")
    if done.unreadable:
        text += f"\n{done.unreadable:,} records could not be read: {line(done.faults[0], 160)}"
    return Text(f"{text}\n\nWritten: {done.out}")


def augmented_table(done: Augmented) -> Group:
    counts = ", ".join(f"{name} {count:,}" for name, count in done.counts.items())
    head = (f"{done.read:,} documents read, {done.written:,} written; {counts or 'no change'}; {done.same:,} copies came out "
            f"as they were and were left out")
    samples = table("Samples", {"before": False, "after": False},
                    [[line(sample["before"]), line(sample["after"])] for sample in done.samples])
    return Group(Text(head), "", samples, "", Text(f"Written: {done.out}"))


def line(text: str, most: int = 72) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most - 1] + "…"
