"""Sources in, one file of clean documents out, and a report of what each step removed.

    read -> (steps of text/steps.py, in worker processes) -> exact duplicates -> near duplicates -> written in order

Memory: about 50 bytes a document (text/duplicates.py), the runs of an evaluation text, and the batches under way. What the
steps leave stands in a folder beside the output until the output stands; a run that was cut off goes on from there
(text/resuming.py). The same sources and settings give the same bytes, whatever the number of workers and interruptions.
"""

from __future__ import annotations

import gzip
import json
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from .. import __version__
from ..errors import SupremumError
from ..progress import phase
from ..workspace import replacing
from .duplicates import banding, exact_groups, near_groups, shingles
from .leakage import Evaluation, Leaks, N
from .parallel import ordered_map
from .reading import Reading
from .resuming import Work, may_replace, resumable
from .sources import bytes_of, files_of, load_text, names_of, state_of, watched
from .steps import Cleaned, Cleaner, Event, Rules, excerpt

SAMPLES, ALIKE = 12, 3  # samples a step, and of one kind
PLACES = 1000  # documents with leaks that are named
ENDS = (".jsonl", ".jsonl.gz", ".txt")
Sources = Sequence[str | Path]


@dataclass
class Step:
    """`dropped`: documents that fell, `changed`: others that it changed (leaks: that hold one); `counts`: of what;
    `samples`: what it met first."""

    dropped: int = 0
    changed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, event: Event, place: str) -> None:
        self.dropped += event.dropped
        self.changed += not event.dropped
        self.counts.update(event.counts)
        kind = next(iter(event.counts), "")
        if len(self.samples) < SAMPLES and sum(sample["kind"] == kind for sample in self.samples) < ALIKE:
            self.samples.append({"kind": kind, "place": place, "before": event.before, "after": event.after})


@dataclass
class CleanReport:
    """`bytes`: of the sources' files (0: a hub dataset is among them); `characters`: of the documents read and kept."""

    out: str
    sources: list[str]
    settings: dict[str, Any]
    read: int = 0
    kept: int = 0
    characters_read: int = 0
    characters_kept: int = 0
    bytes: int = 0
    seconds: float = 0.0
    steps: dict[str, Step] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    leaks: Leaks | None = None
    leak_places: list[str] = field(default_factory=list)

    def step(self, name: str) -> Step:
        return self.steps.setdefault(name, Step())


def clean_text(sources: Sources, out: str | Path, *, rules: Rules | None = None, exact: bool = True, near: float | None = 0.8,
               against: Sources = (), against_field: str | None = None, run: int = N, workers: int | None = None,
               reading: Reading | None = None, strict: bool = False, fresh: bool = False) -> CleanReport:
    """Clean `sources` into the file `out`: .jsonl, .jsonl.gz, or .txt with an empty line between documents.

    near: Jaccard similarity from which documents are duplicates; None keeps them. against: an evaluation text whose runs
    of `run` words are looked for; its field is that of `reading` unless given, plain text is taken by paragraphs unless by
    lines. Records that cannot be read are counted, with `strict` an error. fresh: replace what stands there, and discard
    what an interrupted run left. Raises SupremumError for what the user can mend.
    """
    rules, path, reading = rules or Rules(), Path(out).expanduser(), reading or Reading()
    rules = replace(rules, near=near is not None)
    sources, against = names_of(sources), names_of(against)
    if near is not None and not 0 < near <= 1:
        raise SupremumError(f"A similarity of {near:g} is not above 0 and at most 1.", "0.8 is usual.")
    report = CleanReport(str(path), names_of(sources), {
        **vars(rules), "exact": exact, "near": near, "banding": banding(near) if near is not None else None,
        "against": against, "run": run, "strict": strict}, bytes=bytes_of(sources))
    identity = {"verb": "text clean", "version": [__version__, unicodedata.unidata_version],
                "settings": [report.settings, reading.field, reading.unit, against_field],
                "sources": [state_of(source) for source in [*sources, *against]]}
    check_file(path, sources, fresh or may_replace(path, identity))
    for name in ("read", "html", "characters", *(["language"] if rules.languages else []),
                 *(["quality"] if rules.quality else []), *(["leaks"] if against else []), *(["pii"] if rules.pii else []),
                 *(["exact duplicates"] if exact else []), *(["near duplicates"] if near is not None else [])):
        report.step(name)
    if not strict:
        reading.refuse = lambda fault: report.step("read").add(
            Event("read", {"unreadable": 1}, True, excerpt(str(fault))), reading.place)
    unit = "line" if reading.unit == "line" else "paragraph"
    evaluation = Evaluation(_pairs(against, Reading(against_field or reading.field, unit)), run) if against else None
    with resumable(path, identity, fresh) as work:
        _steps(watched(sources, reading, "clean"), work, Cleaner(rules, evaluation.index if evaluation else None),
               report, evaluation, workers or os.cpu_count() or 1)
        stays_N = _duplicates(work.folder, report, exact, near)
        if not stays_N.any():
            work.forget()
            most = max(report.steps, key=lambda name: report.steps[name].dropped)
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.steps[most].counts.most_common(3))
            raise SupremumError(f"Of {report.read} documents none is left; most fell to `{most}` ({reasons}).",
                                "Loosen that step.")
        with phase("write"):
            with replacing(work.folder / "clean") as temporary:
                _write(work.folder / "documents", stays_N, temporary, path, report)
            os.replace(work.folder / "clean", path)
        report.seconds = work.seconds()
    if evaluation:
        report.leaks = evaluation.result()
    return report


def check_file(path: Path, sources: Sequence[str | Path], fresh: bool) -> None:
    """Refuse an output of another kind, one that is read, and one that exists."""
    if not path.name.endswith(ENDS):
        raise SupremumError(f"{path}: no writer for such files.", f"Name a file that ends with {', '.join(ENDS)}.")
    if path.is_dir():
        raise SupremumError(f"{path}: is a folder.", "Name a file.")
    if any(path.resolve() == file.resolve() for source in sources for file in files_of(str(source))):
        raise SupremumError(f"{path}: is one of the files that are read.", "Choose another --out.")
    if path.exists() and not fresh:
        raise SupremumError(f"{path}: exists.", "--fresh replaces it; or choose another --out.")


def _pairs(sources: Sources, reading: Reading) -> Iterator[tuple[str, str]]:
    for text in load_text(sources, reading):
        yield reading.place, text


def _steps(documents: Iterator[tuple[str, str]], work: Work, cleaner: Cleaner, report: CleanReport,
           evaluation: Evaluation | None, workers: int) -> None:
    """Run the steps; leave the documents, where each begins, their digests and signatures, and the evaluation text's runs
    that were met."""
    places: deque[str] = deque()

    def read() -> Iterator[tuple[str, str]]:
        for place, text in documents:
            report.read += 1
            report.characters_read += len(text)
            yield place, text

    def texts() -> Iterator[str]:
        for place, text in work.left(read()):
            places.append(place)
            yield text

    def counts() -> dict[str, Any]:
        return {"steps": {name: step for name, step in report.steps.items() if name != "read"},
                "leak_places": report.leak_places, "carriers": evaluation.found.carriers if evaluation else 0}

    lines, starts, digests, signatures, runs = map(work.open, ("documents", "starts", "digests", "signatures", "runs"))
    if work.counts:
        for name, step in work.counts["steps"].items():
            report.steps[name] = Step(step["dropped"], step["changed"], Counter(step["counts"]), step["samples"])
        report.leak_places += work.counts["leak_places"]
        if evaluation:
            evaluation.seen[np.fromfile(work.folder / "runs", np.int64)] = True
            evaluation.found.carriers = work.counts["carriers"]
    cleaned: Cleaned
    for cleaned in ordered_map(cleaner, texts(), workers=workers, size=len):
        place = places.popleft()
        for event in cleaned.events:
            report.step(event.step).add(event, place)
        if evaluation and cleaned.leaked is not None and len(cleaned.leaked):
            runs.write(evaluation.mark(cleaned.leaked).astype(np.int64).tobytes())
            if len(report.leak_places) < PLACES:
                report.leak_places.append(place)
        if cleaned.text is not None:
            starts.write(np.int64(lines.tell()).tobytes())
            row = {"text": cleaned.text, "source": place} | ({"language": cleaned.language} if cleaned.language else {})
            lines.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            digests.write(cleaned.digest)
            signatures.write(cleaned.signature)
        work.done(counts)
    work.save(counts())


def _duplicates(folder: Path, report: CleanReport, exact: bool, near: float | None) -> np.ndarray:
    """(N,) bool: which documents stay."""
    count = (folder / "starts").stat().st_size // 8
    if not count:
        return np.zeros(0, dtype=bool)
    own_N = np.arange(count, dtype=np.int64)
    starts_N = np.memmap(folder / "starts", dtype=np.int64, mode="r")
    with (folder / "documents").open("rb") as lines:
        def row(number: int) -> dict[str, str]:
            lines.seek(starts_N[number])
            return json.loads(lines.readline())

        def tell(step: str, number: int, first: int, counts: dict[str, int]) -> None:
            chosen = report.step(step)
            full = sum(sample["kind"] == next(iter(counts)) for sample in chosen.samples) >= ALIKE
            one, other = ({"text": "", "source": ""}, {"text": ""}) if full else (row(number), row(first))
            chosen.add(Event(step, counts, True, excerpt(one["text"]), excerpt(other["text"])), one["source"])

        first_N = exact_groups(folder / "digests") if exact else own_N
        for number in map(int, np.flatnonzero(first_N != own_N)):
            tell("exact duplicates", number, int(first_N[number]), {"documents": 1})
        if near is not None:
            @lru_cache(256)  # a group's first document is compared often
            def shingles_of(number: int) -> np.ndarray:
                return shingles(row(number)["text"])

            with phase("near duplicates", banding(near)[0]) as step:
                group_N, evidence = near_groups(folder / "signatures", shingles_of, near, first_N, step)
            for number in map(int, np.flatnonzero((group_N != own_N) & (first_N == own_N))):
                other, alike = evidence.get(number, (int(group_N[number]), near))
                tell("near duplicates", number, other, {f"similarity {int(alike * 20) / 20:.2f} or more": 1})
            first_N = group_N
    return first_N == own_N


def _write(documents: Path, stays_N: np.ndarray, temporary: Path, path: Path, report: CleanReport) -> None:
    """Write the rows that stay, in order, and count them."""
    with documents.open("rb") as lines, temporary.open("wb") as raw:
        zipped = path.name.endswith(".gz")  # without a time or a name, so that the same text gives the same bytes
        file = cast(BinaryIO, gzip.GzipFile("", "wb", fileobj=raw, mtime=0)) if zipped else raw
        for line, stays in zip(lines, stays_N, strict=True):
            if stays:
                row = json.loads(line)
                report.kept += 1
                report.characters_kept += len(row["text"])
                if "language" in row:
                    report.languages[row["language"]] += 1
                file.write(line if path.suffix != ".txt" else f"{row['text'].strip()}\n\n".encode())
        if zipped:
            file.close()
