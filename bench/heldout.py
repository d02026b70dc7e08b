"""Held-out evidence for finished files, in one run: KL on text of another kind, and zero-shot accuracy with paired flips.

    python bench/heldout.py REFERENCE FILE... --text c4.jsonl --tasks arc_easy.jsonl piqa.jsonl ... [--samples 300]
                            [--tokens 2048] [--length 512] [--seed 0] [--out FILE.json]

REFERENCE and FILE: whatever `supremum evaluate` opens. Every file sees the same windows and the same cases, and the
reference answers the cases once. The table is Markdown; --out is written after every file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from supremum.checkpoint import open_checkpoint
from supremum.measure import evaluate
from supremum.measure.cases import tasks_from
from supremum.measure.zeroshot import TaskQuality, TaskReport, compare_tasks, score_tasks
from supremum.plain import plain
from supremum.text import tokens_from_text
from supremum.workspace import write_atomic


def row(name: str, task: TaskQuality, *, norm: bool) -> str:
    acc, flips = (task.acc_norm, task.flips_norm) if norm else (task.acc, task.flips)
    before = task.acc_norm_reference if norm else task.acc_reference
    assert acc is not None and flips is not None and before is not None and task.margin_change
    change = task.margin_change
    margin = "" if norm else f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
    return (f"| {name} | {task.name}{' by length' if norm else ''} | {task.cases} | {100 * before.value:.1f} "
            f"| {100 * acc.value:.1f} [{100 * acc.low:.1f}, {100 * acc.high:.1f}] "
            f"| {flips['lost']} / {flips['gained']} | {flips['p']:.2g} | {margin} |")


def rows(name: str, report: TaskReport) -> list[str]:
    return [row(name, task, norm=norm) for task in report.tasks for norm in (False, True)
            if not norm or task.acc_norm is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--samples", type=int)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    reference = open_checkpoint(options.reference)
    tasks = tasks_from(options.tasks, samples=options.samples, seed=options.seed)
    windows = tokens_from_text(reference, options.text, tokens=options.tokens, length=options.length, seed=options.seed) \
        if options.text else None
    base = score_tasks(reference, tasks) if tasks else []
    kl, accuracy, document = [], [], {"arguments": plain(vars(options)), "files": {}}
    for file in options.files:
        checkpoint = open_checkpoint(file)
        name = Path(file).name
        found: dict[str, object] = {}
        if windows is not None:
            found["quality"] = quality = evaluate(checkpoint, reference, windows)
            kl.append(f"| {name} | {quality.kl_mean:.4f} ± {quality.kl_se or 0:.4f} | {100 * quality.same_top:.1f} % "
                      f"| {quality.perplexity:.2f} | {quality.perplexity_reference:.2f} |")
        if tasks:
            found["report"] = report = compare_tasks(tasks, score_tasks(checkpoint, tasks), base, seed=options.seed)
            accuracy += rows(name, report)
        document["files"][file] = plain(found)
        if options.out:
            write_atomic(options.out, json.dumps(document, indent=1).encode())
    if kl:
        print("| file | KL, nats a token | same token | perplexity | of the original |\n"
              "|---|---|---|---|---|", *kl, "", sep="\n")
    if accuracy:
        print("| file | task | cases | original, % | %, with 95 % | lost / gained | p (McNemar) | margin's change, nats |\n"
              "|---|---|---|---|---|---|---|---|", *accuracy, sep="\n")


if __name__ == "__main__":
    main()
