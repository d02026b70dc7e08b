"""Proof that a finished file works: the stock runtime's answers against our own decoding of the same file.

In a fresh process only the runtime opens the file and gives the log-probabilities of the likeliest next tokens after
several prefixes of a few texts. Here the file is opened as any checkpoint, decoded to float32 and asked the same. With
p ours, q the runtime's, and all tokens below the runtime's top k pooled into one,

    KL = sum_top p (ln p - ln q) + p_rest (ln p_rest - ln q_rest)         (pooling can only lower it)
    relative error = std_top(ln q - ln p) / std_top(ln p)                 (free of the common shift)

The runtime's own tokenizer must also give the tokens that the checkpoint's does.

How far is too far. Transformers in float32 must agree to rounding (measured: relative error 3e-6). llama.cpp rounds
activations (`rounding`), so our model is run a second time with the same rounding: its distance from the exact answers
is the distance to be expected of llama.cpp. The limit is MARGIN times that, plus a floor for float16 keys and values.
Measured on SmolLM2-135M: expected 0.101 and found 0.091 (Q4_0), 0.071 and 0.070 (Q4_1); with the q rows of one layer
out of thirty left unpermuted 0.58.

Where the stock runtime is a package that users may lack (`Capabilities.package`), nothing is claimed without it: the proof
has not passed, its figures are None, and the reports say which package is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SupremumError
from ..limits.topology import usable_cores
from ..progress import note
from ..text.pairs import bare, join, written
from ..text.windows import context_length
from ..versions import version_of
from . import Capabilities, Tolerance, capabilities
from .blockwise import float32_model
from .probe import failure
from .rounding import rounded
from .transformers import answers

TEXTS = (
    "The lighthouse keeper climbed the stairs every evening at six, lit the lamp, and wrote the weather in a book. On "
    "the last day of March the wind came from the north, and by midnight he could no longer see the harbour.",
    "def mean(values):\n    # The average of a list that is not empty.\n    return sum(values) / len(values)\n\n\n"
    "print(mean([1, 2, 3, 4]))",
    "In 1869 Dmitri Mendeleev arranged 63 known elements by weight and left gaps for those that nobody had found yet; "
    "gallium (1875), scandium (1879) and germanium (1886) filled three of them.",
)  # fmt: skip
POSITIONS = 4  # prefixes of each text
TOP = 2048  # tokens compared at each position
SHOWN = 16  # of these, the likeliest, for the largest difference
SPEED = (128, 32)  # tokens to prefill and to generate for the speed


MARGIN = Tolerance(kl=5.0, error=1.5)  # times what the runtime's rounding of activations explains


@dataclass(frozen=True)
class Proof:
    """What the runtime answered. KL in nats; memory in bytes, what loading and running added to the process.

    `expected_error`: the relative error that the runtime's own rounding of activations explains. Without the runtime
    there are no positions and no figures, and nothing has passed.
    """

    runtime: str
    version: str
    positions: int
    top: int
    kl_mean: float | None
    kl_max: float | None
    relative_error: float | None
    expected_error: float | None
    largest_difference: float | None
    same_top: float | None
    same_tokens: bool | None
    load_seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    memory: int
    threads: int
    seconds: float
    passed: bool

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def verify(path: str | Path, target: Any, reference: Any = None, *, prompts: list[list[int]] | None = None,
           threads: int | None = None, tolerance: Tolerance | None = None, timeout: float = 1800) -> Proof:
    """Load `path` in the target's stock runtime, in a fresh process, and compare its answers with ours.

    `reference`: the opened result (default: opened from `path`). `prompts`: token ids instead of the built-in texts; of an
    encoder-decoder pairs (text/pairs.py), without which each built-in text is its own source.
    Raises SupremumError if the runtime refuses the file, runs out of time, or answers differently. An engine whose package
    may be missing, and is, gives a proof that has not passed.
    """
    start = time.perf_counter()
    engine = capabilities(target.runtime)
    if engine.package and version_of(engine.package) is None:
        return _unproved(target.runtime, engine)
    if reference is None:
        from ..checkpoint import open_checkpoint

        reference = open_checkpoint(path)
    texts = [] if prompts else list(TEXTS)
    ours = [list(reference.tokenizer()(text).input_ids) for text in texts]
    room = (context_length(reference) or 1 << 20) - 8
    if reference.config.is_encoder_decoder:
        first = reference.config.decoder_start_token_id or 0
        prompts = prompts or [bare(join([ids[:room]], [[first, *ids[:room]]])[0]) for ids in ours]
    else:
        prompts = [prompt[:room] for prompt in prompts or ours]
    asked = [len(written(torch.tensor(prompt))) for prompt in prompts]
    lengths = [sorted({max(1, length * (i + 1) // POSITIONS) for i in range(POSITIONS)}) for length in asked]
    request = {
        "runtime": target.runtime, "path": str(path), "threads": threads or usable_cores(),
        "context": _context(prompts), "texts": texts, "prompts": prompts, "lengths": lengths,
        "count": min(TOP, reference.config.vocab_size), "speed": _speed(reference, prompts),
    }
    ids_PK, log_q_PK, facts = probe(request, timeout)
    log_p_PV, expected = _ours(reference, prompts, lengths, engine.rounds)
    kl_P, error_P, largest, same = compare(log_p_PV, ids_PK, log_q_PK)
    limit = tolerance or Tolerance(engine.floor.kl + MARGIN.kl * expected.kl,
                                   engine.floor.error + MARGIN.error * expected.error)
    kl, error = float(kl_P.mean()), float(error_P.mean())
    same_tokens = facts["tokens"] == ours if texts else None
    passed = kl <= limit.kl and error <= limit.error and same_tokens is not False
    proof = Proof(
        runtime=target.runtime, version=facts["version"], positions=len(kl_P), top=ids_PK.shape[1], kl_mean=kl,
        kl_max=float(kl_P.max()), relative_error=error, expected_error=expected.error, largest_difference=largest,
        same_top=same, same_tokens=same_tokens, load_seconds=facts["load_seconds"],
        prefill_tokens_per_second=facts["prefill"], decode_tokens_per_second=facts["decode"], memory=facts["memory"],
        threads=request["threads"], seconds=time.perf_counter() - start, passed=passed)
    if not passed:
        raise SupremumError(
            f"{path}: {proof.version} answers differently from our decoding of the same file "
            f"(KL {kl:.2g} of at most {limit.kl:g} nats, relative error {error:.2g} of at most {limit.error:g}, "
            f"same top token at {same:.0%} of {len(kl_P)} positions, same token ids: {same_tokens}).",
            "The file is not fit for use; please report this line, the command and what `supremum doctor` prints.")
    return proof


def _unproved(runtime: str, engine: Capabilities) -> Proof:
    note(f"Not proved in a stock runtime: install {engine.package}.")
    return Proof(
        runtime=runtime, version="", positions=0, top=0, kl_mean=None, kl_max=None, relative_error=None, expected_error=None,
        largest_difference=None, same_top=None, same_tokens=None, load_seconds=0.0, prefill_tokens_per_second=None,
        decode_tokens_per_second=None, memory=0, threads=0, seconds=0.0, passed=False)


def probe(request: dict[str, Any], timeout: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Run `supremum.runtime.probe` in a fresh process: (ids (P, K) int64, log-probabilities (P, K) float32, facts)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.npz"
        command = [sys.executable, "-m", "supremum.runtime.probe", str(out)]
        try:
            done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout,
                                  errors="replace")
        except subprocess.TimeoutExpired as error:
            raise SupremumError(f"{request['path']}: {request['runtime']} gave no answer in {timeout:g} s.") from error
        if done.returncode != 0:
            raise _failed(request, done, failure(out))
        with np.load(out, allow_pickle=False) as file:
            return (torch.from_numpy(file["ids"]), torch.from_numpy(file["log_p"]), json.loads(str(file["facts"])))


def _failed(request: dict[str, Any], done: subprocess.CompletedProcess[str], told: Path) -> SupremumError:
    """What went wrong in the probe: its own report and the first errors that the engine logged."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if told.exists():
        report = json.loads(told.read_text())
        logged = [line for line in lines if "error" in line.lower()]
        return SupremumError(report["cause"], " ".join(logged[:2]) or report["remedy"])
    how = f"died of signal {-done.returncode}" if done.returncode < 0 else "failed"
    return SupremumError(f"{request['path']}: {request['runtime']} {how}.", " ".join(lines[-3:]))


def compare(log_p_PV: Tensor, ids_PK: Tensor, log_q_PK: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """(KL and relative error of each position, largest difference among the likeliest, share of same top tokens)."""
    log_p_PV, log_q_PK = log_p_PV.double(), log_q_PK.double()
    log_p_PK = log_p_PV.gather(1, ids_PK)
    kl_P = (log_p_PK.exp() * (log_p_PK - log_q_PK)).sum(1)
    if ids_PK.shape[1] < log_p_PV.shape[1]:
        tiny = torch.tensor(1e-12, dtype=torch.float64)
        rest_p = torch.maximum(1 - log_p_PK.exp().sum(1), tiny)
        rest_q = torch.maximum(1 - log_q_PK.exp().sum(1), tiny)
        kl_P = kl_P + rest_p * (rest_p / rest_q).log()
    error_P = (log_q_PK - log_p_PK).std(1) / log_p_PK.std(1).clamp_min(1e-12)
    largest = float((log_q_PK - log_p_PK)[:, :SHOWN].abs().max())
    same = float((log_p_PV.argmax(1) == ids_PK.gather(1, log_q_PK.argmax(1, keepdim=True))[:, 0]).double().mean())
    return kl_P, error_P, largest, same


@torch.inference_mode()
def _ours(reference: Any, prompts: list[list[int]], lengths: list[list[int]], rounds: bool) -> tuple[Tensor, Tolerance]:
    """ln p (P, V) of our decoding in float32, and how far rounding as llama.cpp does moves it (0 if not `rounds`)."""
    model = float32_model(reference)
    exact_PV = _answers(model, prompts, lengths)
    if not rounds:
        return exact_PV, Tolerance(0.0, 0.0)
    with rounded(model, reference):
        top = _answers(model, prompts, lengths).topk(min(TOP, exact_PV.shape[1]))
    kl_P, error_P, _, _ = compare(exact_PV, top.indices, top.values)
    return exact_PV, Tolerance(float(kl_P.mean()), float(error_P.mean()))


def _answers(model: Any, prompts: list[list[int]], lengths: list[list[int]]) -> Tensor:
    return torch.cat([answers(model, prompt, ends).log_softmax(-1) for prompt, ends in zip(prompts, lengths, strict=True)])


def _context(prompts: list[list[int]]) -> int:
    longest = max(*map(len, prompts), sum(SPEED)) + 8
    return -(-longest // 256) * 256


def _speed(reference: Any, prompts: list[list[int]]) -> tuple[list[int], int]:
    """The tokens to prefill (the prompts, over and over) and how many to add; fewer where the context is short."""
    room = context_length(reference) or 1 << 20
    text = [token for prompt in prompts for token in prompt if token >= 0] * SPEED[0]
    return text[: min(SPEED[0], room // 2)], min(SPEED[1], room // 4)
