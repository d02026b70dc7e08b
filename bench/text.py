"""The text verbs on given data: how often the language filter is right, and the memory of one worker of `text clean`.

    python bench/text.py DATA [--most 2000]

DATA holds multi30k/, sst2/, xquad/, zh-sentiment/ and c4-sample-700.jsonl. Languages are told sentence by sentence. Memory is
the peak of a fresh process on the C4 sample, once and four times over.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from supremum.text.language import language

CHILD = """
import sys
from supremum.progress import peak_rss_mb
from supremum.text import clean_text
started = peak_rss_mb()
clean_text([sys.argv[1]], sys.argv[2], workers=1)
print(round(started), round(peak_rss_mb()))
"""


def texts(data: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(name, its language, sentences)."""
    for code in ("en", "de"):
        with gzip.open(data / f"multi30k/test_2016_flickr.{code}.gz", "rt", encoding="utf-8") as file:
            yield f"Multi30k test 2016, {code}", code, file.read().splitlines()
    rows = (data / "sst2/test.tsv").read_text(encoding="utf-8").splitlines()
    yield "SST-2 test", "en", [row.split("\t")[0] for row in rows]
    for code in ("en", "zh"):
        found = json.loads((data / f"xquad/xquad.{code}.json").read_text(encoding="utf-8"))["data"]
        paragraphs = [paragraph for article in found for paragraph in article["paragraphs"]]
        yield f"XQuAD questions, {code}", code, [asked["question"] for one in paragraphs for asked in one["qas"]]
        yield f"XQuAD paragraphs, {code}", code, [one["context"] for one in paragraphs]
    (reviews,) = (data / "zh-sentiment").glob("*.csv")
    with reviews.open(encoding="utf-8-sig", newline="") as file:
        yield "hotel reviews, zh", "zh", [row["review"] for row in csv.DictReader(file) if row["review"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--most", type=int, default=2000, help="sentences of each text")
    args = parser.parse_args()
    for name, code, sentences in texts(args.data):
        sentences = sentences[:args.most]
        right = sum(language(sentence)[0] == code for sentence in sentences)
        print(f"{name}: {100 * right / len(sentences):.1f} % of {len(sentences):,}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sample = (args.data / "c4-sample-700.jsonl").read_bytes()
        for times in (1, 4):
            source = Path(folder) / f"{times}.jsonl"
            source.write_bytes(sample * times)
            done = subprocess.run([sys.executable, "-c", CHILD, str(source), str(Path(folder) / f"out{times}.jsonl")],
                                  stdout=subprocess.PIPE, text=True, check=True)
            started, peak = done.stdout.split()
            print(f"text clean, one process, {len(sample) * times / 1e6:.1f} MB: peak {peak} MB ({started} MB at the start)")


if __name__ == "__main__":
    main()
