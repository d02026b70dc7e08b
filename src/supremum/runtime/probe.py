"""The process in which only the stock runtime sees a finished file: `python -m supremum.runtime.probe OUT < REQUEST`.

Request (JSON on stdin): runtime, path, threads, texts to tokenize, prompts (lists of token ids) with the prefix lengths
to ask at, how many log-probabilities, how many tokens to time, in how many rounds, of which the best is told, and for
llama.cpp perhaps the types of keys and values in its cache. Answers go to the file OUT (.npz), not to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from ..errors import SupremumError
from . import load

PATIENCE = 5.0  # seconds after which no further round is timed


def failure(out: Path) -> Path:
    """Where a refusal is told: the engines' threads log to stderr whenever they like."""
    return out.with_suffix(".failed")


def main() -> int:
    request, out = json.load(sys.stdin), Path(sys.argv[1])
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.perf_counter()
    try:
        options = {"cache": request["cache"]} if "cache" in request else {}
        runtime = load(request["runtime"], request["path"], threads=request["threads"], context=request["context"], **options)
        load_seconds = time.perf_counter() - start
        tokens = [runtime.tokenize(text) for text in request["texts"]]
        ids, values = [], []
        for prompt, lengths in zip(request["prompts"], request["lengths"], strict=True):
            for top, log_p in runtime.logprobs(prompt, lengths, request["count"]):
                ids.append(top)
                values.append(log_p)
        speeds, timed = [runtime.speed(*request["speed"])], time.perf_counter()
        while len(speeds) < request.get("rounds", 1) and time.perf_counter() - timed < PATIENCE:
            speeds.append(runtime.speed(*request["speed"]))
        memory = process.memory_info().rss - before
        facts = {"version": runtime.version, "load_seconds": load_seconds, "memory": memory, "tokens": tokens,
                 "prefill": max(speed.prefill for speed in speeds), "decode": max(speed.decode for speed in speeds)}
        runtime.close()
    except SupremumError as error:
        failure(out).write_text(json.dumps({"cause": error.cause, "remedy": error.remedy}))
        return 1
    with out.open("wb") as file:
        np.savez(file, ids=np.array(ids, np.int64), log_p=np.array(values, np.float32), facts=json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
