"""What each stage of the main solve buys: KL to the original, processor time, and KL bought a minute.

    python bench/stages.py REFERENCE CALIBRATION_TEXT TEST_TEXT [--only int3-g64] [--tokens 8192] [--windows 16] [--json]

Every linear layer of the blocks in one format; the embedding, the head and the norms stay. Each row adds one stage:

    nearest         searched scales, nearest rounding                                      solve/scales.py
    cancellation    errors cancelled in later columns, scales refitted                     solve/cancellation.py
    token weights   the moments' means over tokens weigh each by its gradient's norm       stats/fisher.py
    descent         weight by weight, rows together in the output Fisher's metric          solve/descent.py
    drift           block by block on the drifted inputs, the targets corrected            solve/final.py
    gains           norms, biases and rows' scales trained on the KL                       solve/gains.py

The first four see the original's inputs. CPU seconds are of the whole way to the row's file: the statistics that it needs
(the forward sweep; from the token weights on the backward one), the solve, the training with the measurements that decide on
it. A row's minute is what it takes more than the row before. KL: on the held-out windows of the calibration text (which
choose among the states of the gains) and on windows of the test text, by which the KL a minute goes. One thread counts
truest: OMP_NUM_THREADS=1. --json: the table goes to standard error and a JSON document to standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import LazyCoded
from supremum.gather import Gathered, gather, gather_fisher, window_length
from supremum.measure.streamed import final_hidden, streamed_quality
from supremum.plain import plain
from supremum.solve.candidates import load_coded, save_matrices
from supremum.solve.final import Grids, joint_weights, solve_final, solve_repeated
from supremum.solve.gains import train_gains
from supremum.stats.sweep import Inputs, accumulate, hidden_file, moments, run_block
from supremum.text.windows import read_windows
from supremum.workspace import Workspace


@dataclass(frozen=True)
class Row:
    """One stage with all before it. KL: nats a token."""

    stage: str
    held_out_kl: float
    held_out_se: float
    test_kl: float
    test_se: float
    cpu_seconds: float  # of all that led to it
    more_seconds: float  # than the row before
    bought: float | None  # KL on the test text, less than the row before has, a minute of those

    def line(self) -> str:
        kl = f"{self.held_out_kl:.4f} ± {self.held_out_se:.4f} | {self.test_kl:.4f} ± {self.test_se:.4f}"
        bought = "" if self.bought is None else f"{self.bought:.3f}"
        return f"| {self.stage} | {kl} | {self.cpu_seconds:.0f} | {self.more_seconds:.0f} | {bought} |"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU seconds."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def weighted(gathered: Gathered, number: int, keys: dict[str, str]) -> dict[str, Tensor]:
    """E[w x x^T] of the original's inputs by key, of the block that call `number` runs; w: the final solve's weights."""
    call, workspace = gathered.calls[number], gathered.workspace
    scores = {name.removeprefix("w|"): score_NT.flatten()
              for name, score_NT in gathered.block_fisher(call.block, "w|").items()}
    roots = {key: joint_weights([scores[name] for name in keys if keys[name] == key]).sqrt() for key in set(keys.values())}
    sums: dict[str, Tensor] = {}
    seen: Counter[str] = Counter()

    def visit(key: str, x_TI: Tensor) -> None:
        root_T1 = roots[key][seen[key]:seen[key] + len(x_TI), None]
        accumulate(sums, key, (x_TI.float() * root_T1).to(x_TI.dtype))
        seen[key] += len(x_TI)

    with gathered.stream.block(call.block) as block, Inputs(visit).on(block):
        run_block(block, call, workspace.load(hidden_file(number))["h"])
    return {key: total / seen[key] for key, total in sums.items()}


def on_originals(gathered: Gathered, plan: dict[str, str], grids: Grids, folder: str, *, weigh: bool) -> dict[str, str]:
    """Every block for the original's inputs; the file that holds each tensor. A block that is used more than once is not
    weighed, as the final solve does not."""
    files: dict[str, str] = {}
    blocks = [call.block for call in gathered.calls]
    for block in gathered.stream.blocks:
        sums, keys = moments(gathered.workspace, gathered.calls, block)
        if weigh and blocks.count(block) == 1:
            sums = weighted(gathered, blocks.index(block), keys)
        solved = solve_repeated(block, plan, gathered.weight, sums, keys, grids)
        file = f"{folder}/{blocks.index(block):04d}.safetensors"
        save_matrices(gathered.workspace, file, solved)
        files |= dict.fromkeys(solved, file)
    return files


def loaded(gathered: Gathered, plan: dict[str, str], files: dict[str, str]) -> LazyCoded:
    return LazyCoded(plan, lambda name: load_coded(gathered.workspace, files[name], name, plan[name], gathered.shapes[name]))


def stages(gathered: Gathered, codec: str, test_NT: Tensor, statistics: tuple[float, float], say: Callable[[str], None],
           ) -> list[Row]:
    """The rows, each said when it is measured. statistics: CPU seconds of the forward and of the backward sweep."""
    stream, workspace = gathered.stream, gathered.workspace
    plan = {name: codec for name in gathered.shapes if name not in stream.tables()}
    full = Grids(gathered.fisher_of)
    held_out_NTd, test_NTd = final_hidden(stream, gathered.held_out), final_hidden(stream, test_NT)
    least = min(plan, key=lambda name: math.prod(gathered.shapes[name]))
    block = next(block for block in stream.blocks if least.startswith(f"{block}."))
    sums, keys = moments(workspace, gathered.calls, block)
    key = keys[least.removeprefix(f"{block}.").removesuffix(".weight")]
    full.solve({least: gathered.weight(least)}, sums[key], plan)  # compile
    rows: list[Row] = []

    def row(stage: str, folder: str, coded: LazyCoded, vectors: dict[str, Tensor], seconds: float) -> None:
        def quality(windows_NT: Tensor, reference_NTd: Tensor) -> dict[str, Any]:
            return streamed_quality(stream, windows_NT, reference_NTd,
                                    lambda name: vectors[name] if name in vectors else coded.decoded(name), "measure",
                                    coded.plan.get).to_dict()

        held_out = workspace.json(f"{folder}/quality.json", lambda: quality(gathered.held_out, held_out_NTd))
        test = quality(test_NT, test_NTd)
        more = seconds - (rows[-1].cpu_seconds if rows else 0.0)
        bought = 60 * (rows[-1].test_kl - test["kl_mean"]) / more if rows and more > 0 else None
        rows.append(Row(stage, held_out["kl_mean"], held_out["kl_se"], test["kl_mean"], test["kl_se"], seconds, more, bought))
        say(rows[-1].line())

    forward, both = statistics[0], sum(statistics)
    for stage, grids, weigh in (("nearest", Grids(feedback=False), False), ("+ cancellation", Grids(), False),
                                ("+ token weights", Grids(), True), ("+ descent", full, True)):
        folder = stage.removeprefix("+ ")
        files, seconds = timed(lambda grids=grids, weigh=weigh, folder=folder: on_originals(  # type: ignore[misc]
            gathered, plan, grids, folder, weigh=weigh))
        row(stage, folder, loaded(gathered, plan, files), {}, (both if weigh else forward) + seconds)
    files, seconds = timed(lambda: solve_final(stream, gathered.windows, workspace, plan, gathered.weight, gathered.shapes,
                                               "drift", {}, full))
    coded = loaded(gathered, plan, files)
    row("+ drift", "drift", coded, {}, both + seconds)
    trained, training = timed(lambda: train_gains(stream, gathered.windows, gathered.held_out, held_out_NTd, workspace, coded,
                                                  "drift"))
    row("+ gains", "gains", trained.coded, trained.vectors, both + seconds + training)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--only", default="int3-g64", help="the format")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--windows", type=int, default=16, help="of the test text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the forward passes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    checkpoint = open_checkpoint(args.reference)
    test_NT = read_windows(checkpoint, [args.test], length=window_length(checkpoint), wanted=args.windows)[:args.windows]

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "work", {})
        gathered, forward = timed(lambda: gather(checkpoint, workspace, text=[args.calibration], tokens=args.tokens,
                                                 seed=args.seed, dtype=args.dtype))
        _, backward = timed(lambda: gather_fisher(gathered, args.seed))
        say("| stage | KL, held-out | KL, test text | CPU s | more | KL a minute |\n|---|---|---|---|---|---|")
        rows = stages(gathered, args.only, test_NT, (forward, backward), say)
    if args.json:
        print(json.dumps(plain({"reference": args.reference, "format": args.only, "tokens": args.tokens,
                                "test_tokens": test_NT.numel(), "threads": torch.get_num_threads(),
                                "forward_seconds": forward, "backward_seconds": backward,
                                "stages": rows}), indent=1))


if __name__ == "__main__":
    main()
