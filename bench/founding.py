"""The founding experiment: does a quadratic model predict how far a compressed model's answers move?

    python bench/founding.py MODEL TEXT_CALIBRATION TEXT_HELDOUT [--tokens 8192] [--sequences 32]
        [--predict-from held-out calibration] [--out FILE.md]

Codes: nearest rounding and error feedback (int5 ... int2, groups of 64); the ideal Gaussian code of each layer at 4, 3, 2
bits (reverse water-filling in the eigenbasis of S, B = I: what WaterSIC approaches); and the code of the model-wide limit
(one water level over the eigenbases of S and B) at 4 and 3 bits. Ideal codes are drawn from the test channel, component by
component with k = min(1, theta / u):

    dw = -k w + sqrt(k (1 - k)) s n,   n ~ N(0, 1)        E[dw^2] = k s^2 = min(s^2, theta / (u / s^2))

Predictions of the KL, nats a token, g = d log p(y ~ model) / dy of a layer's output y, dy = dW x, T tokens a sequence:

    per token       1/2 E[(g . dy)^2]              element-wise   1/2 E[sum_j (g_j dy_j)^2]
    K-FAC           1/2 tr(B dW S dW^T)            sequence       1/2 E_s[(sum_t g_t . dy_t)^2] / T
    with cross      the last, summed over layers before squaring: with the terms between layers

Codes are made from S and B of the calibration text; the KL is measured on windows of the held-out text. Predictions come
from other windows of the held-out text ("held-out": is the form right?), of the calibration text ("calibration": does the
text matter?), or from the very tokens that the codes were made from ("in-sample": as a compressor prices its candidates).
A ratio is predicted over measured, with one standard error by bootstrap over sequences (K-FAC: eight groups) and windows.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from founding_codes import CODES, LIMIT, Codes, Statistics
from torch import Tensor

from supremum.checkpoint import open_checkpoint
from supremum.measure.scores import Comparison
from supremum.progress import track
from supremum.stats.calls import Call
from supremum.stats.fisher import fisher
from supremum.stats.streaming import BlockStream, linears, set_weight
from supremum.stats.sweep import hidden_file, run_block, sweep
from supremum.text.windows import read_windows, spread
from supremum.workspace import Workspace

FORMS = ("per token", "element-wise", "K-FAC", "sequence", "with cross")
GROUPS = 8  # of sequences, whose B are kept apart for K-FAC's interval
DRAWS = 2000
SMALL = 0.2  # KL up to which the second order is asked to hold


class Forms:
    """The predictions of every layer and code, gathered by hooks while `stats.fisher` runs its backward pass.

    `values`: "form|tensor|code" -> one number a sequence (K-FAC: a group of them); of "sequence" the inner product.
    """

    def __init__(self, statistics: Statistics, codes: Codes) -> None:
        self.statistics, self.codes = statistics, codes
        self.values: dict[str, Tensor] = {}
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._fisher: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._changes: dict[str, dict[str, Tensor]] = {}
        self._fast: dict[str, dict[str, Tensor]] = {}
        self._block = ""

    def changes(self, name: str) -> dict[str, Tensor]:
        """dW of every code; a new block's first layer closes the block before."""
        block = next((b for b in self.codes.blocks if name.startswith(f"{b}.")), "")
        if not block:
            return {}
        if block != self._block:
            self.close()
            self._block = block
            self._changes = defaultdict(dict)
            for code in CODES:
                for tensor, weight_OI in self.codes.read(block, code).items():
                    self._changes[tensor][code] = weight_OI - self.codes.weight(tensor)
            dtype = self.statistics.stream.dtype
            self._fast = {t: {c: d.to(dtype) for c, d in found.items()} for t, found in self._changes.items()}
        return self._changes[name]

    @classmethod
    def of(cls, statistics: Statistics, codes: Codes, seed: int) -> dict[str, Tensor]:
        """The values, kept in the statistics' workspace."""
        if not statistics.workspace.has("forms.safetensors"):
            statistics.workspace.remove("fisher/*")  # the hooks must see every block
            statistics.workspace.remove("gradient/*")
            statistics.workspace.save("forms.safetensors", cls(statistics, codes)._run(seed))
        return statistics.workspace.load("forms.safetensors")

    def _run(self, seed: int) -> dict[str, Tensor]:
        statistics = self.statistics
        handles = [layer.register_forward_hook(self._hook(f"{block}.{inner}.weight"))
                   for block, module in statistics.stream.blocks.items() for inner, layer in linears(module).items()]
        try:
            fisher(statistics.stream, statistics.windows, statistics.workspace, length=statistics.windows.shape[1],
                   seed=seed)
        finally:
            for handle in handles:
                handle.remove()
        self.close()
        return self.values

    def close(self) -> None:
        """K-FAC of the block that was just done."""
        if not self._block:
            return
        sums, keys = self.statistics.moments(self._block)
        for layer, key in keys.items():
            name = f"{self._block}.{layer}.weight"
            for code, change_OI in self._changes[name].items():
                image_OO = change_OI @ sums[key] @ change_OI.T
                self.values[f"K-FAC|{name}|{code}"] = 0.5 * (self._fisher[name] * image_OO).sum((1, 2))
        self.values |= {key: torch.cat(parts) for key, parts in self._parts.items()}
        self._parts.clear()
        self._fisher.clear()

    def _hook(self, name: str):
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x_NTI = args[0].detach()
                output.register_hook(lambda g_NTO: self._add(name, x_NTI, g_NTO))
        return hook

    def _add(self, name: str, x_NTI: Tensor, g_NTO: Tensor) -> None:
        count, length = g_NTO.shape[:2]
        g_NTO = g_NTO.float()
        self.changes(name)  # of this block, if it is a new one
        for code, change_OI in self._fast[name].items():
            product_NTO = g_NTO * (x_NTI @ change_OI.T).float()
            self._parts[f"per token|{name}|{code}"].append(0.5 * product_NTO.sum(-1).square().mean(1))
            self._parts[f"sequence|{name}|{code}"].append(product_NTO.sum((1, 2)))
            self._parts[f"element-wise|{name}|{code}"].append(0.5 * product_NTO.square().sum(-1).mean(1))
        total = len(self.statistics.windows)
        own_KOO = self._fisher.setdefault(name, torch.zeros(GROUPS, g_NTO.shape[-1], g_NTO.shape[-1]))
        first = self._seen.get(name, 0)
        for n in range(count):
            own_KOO[(first + n) * GROUPS // total] += g_NTO[n].T @ g_NTO[n] * GROUPS / (total * length)
        self._seen[name] = first + count


def measure(stream: BlockStream, windows: Tensor, codes: Codes, scopes: dict[str, range], workspace: Workspace,
            ) -> dict[str, dict[str, list[float]]]:
    """Measured KL of each scope and code, the mean of each window; scope: the blocks that are compressed."""
    sweep(stream, windows, workspace)
    calls = stream.calls(windows)
    return {scope: workspace.json(f"measured-{scope}.json", lambda chosen=chosen, scope=scope: _measure(
        stream, windows, codes, chosen, scope, calls, workspace)) for scope, chosen in scopes.items()}


def _measure(stream: BlockStream, windows: Tensor, codes: Codes, chosen: range, scope: str, calls: list[Call],
             workspace: Workspace) -> dict[str, list[float]]:
    start = workspace.load(hidden_file(chosen[0]))["h"]
    hidden = dict.fromkeys(CODES, start)
    for k in track(range(chosen[0], len(calls)), f"measure {scope}"):
        with stream.block(calls[k].block) as block:
            for code in CODES:
                if k in chosen:
                    for name, weight_OI in codes.read(calls[k].block, code).items():
                        inner = name.removeprefix(f"{calls[k].block}.").removesuffix(".weight")
                        set_weight(block.get_submodule(inner), weight_OI)
                hidden[code] = run_block(block, calls[k], hidden[code])
    reference_NTd = workspace.load(hidden_file(len(calls)))["h"]
    found: dict[str, list[float]] = defaultdict(list)
    with stream.head() as head, torch.no_grad():
        for n, window_T in enumerate(windows):
            logits_TV = head(reference_NTd[n:n + 1])[0, :-1]
            for code in CODES:
                scores = Comparison().add(logits_TV, head(hidden[code][n:n + 1])[0, :-1], window_T[1:])
                assert scores.kl is not None
                found[code].append(float(scores.kl.double().mean()))
    return found


def predicted(values: dict[str, Tensor], codes: Codes, chosen: range, code: str, length: int) -> dict[str, Tensor]:
    """Of each form the predicted KL of every sequence (of every group for K-FAC); their mean is the prediction."""
    blocks = tuple(f"{codes.blocks[k]}." for k in chosen)
    names = [name for name in codes.oriented if name.startswith(blocks)]
    found = {form: torch.stack([values[f"{form}|{name}|{code}"] for name in names]).double() for form in FORMS[:4]}
    products_LN = found.pop("sequence")
    return {form: every.sum(0) for form, every in found.items()} | {
        "sequence": 0.5 * products_LN.square().sum(0) / length, "with cross": 0.5 * products_LN.sum(0).square() / length}


def interval(prediction_N: Tensor, measured_n: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """(predicted / measured, standard error of its log)."""
    def draws(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (DRAWS, len(values)), generator=generator)].mean(1)

    return float(prediction_N.mean() / measured_n.mean()), float((draws(prediction_N) / draws(measured_n)).log().std())


def table(values: dict[str, Tensor], measured: dict[str, dict[str, list[float]]], codes: Codes, scopes: dict[str, range],
          length: int) -> str:
    """Markdown: a row a code and scope, then each form's bias and spread."""
    generator = torch.Generator().manual_seed(0)
    lines = ["| change | blocks | measured KL | " + " | ".join(FORMS) + " |", "|---" * (3 + len(FORMS)) + "|"]
    logs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for code in CODES:
        for scope, chosen in scopes.items():
            kl_n = torch.tensor(measured[scope][code]).double()
            cells = []
            for form, prediction_N in predicted(values, codes, chosen, code, length).items():
                ratio, error = interval(prediction_N, kl_n, generator)
                cells.append(f"{ratio:.2f} ± {ratio * error:.2f}")
                if kl_n.mean() < SMALL:
                    for kind in (code.split()[0], "all"):
                        logs[form, kind].append(math.log(ratio))
            error = float(kl_n.std()) / len(kl_n) ** 0.5
            lines.append(f"| {code} | {scope} | {float(kl_n.mean()):.3g} ± {error:.1g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + summary(logs)


def summary(logs: dict[tuple[str, str], list[float]]) -> str:
    lines = [f"Geometric mean of predicted / measured where the KL is below {SMALL:g}, and the factor that one standard "
             "deviation of it covers:", "", "| codes | rows | " + " | ".join(FORMS) + " |", "|---" * (2 + len(FORMS)) + "|"]
    for kind in ("nearest", "feedback", "ideal", "limit", "all"):
        cells = [torch.tensor(logs[form, kind]) for form in FORMS]
        lines.append(f"| {kind} | {len(cells[0])} | " + " | ".join(
            f"{float(c.mean().exp()):.2f}, x {float(c.std().exp()):.2f}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def promises(measured: dict[str, dict[str, list[float]]], codes: Codes, scopes: dict[str, range]) -> str:
    lines = ["The limit's own KL at its water level (the S and B that made the code, no code drawn):", "",
             "| bits | blocks | promised | measured |", "|---|---|---|---|"]
    for bits in LIMIT:
        for scope, chosen in scopes.items():
            inside = tuple(f"{codes.blocks[k]}." for k in chosen)
            promised = sum(kl for name, kl in codes.promised[bits].items() if name.startswith(inside))
            kl_n = torch.tensor(measured[scope][f"limit {bits} bits"])
            lines.append(f"| {bits} | {scope} | {promised:.3g} | {float(kl_n.mean()):.3g} |")
    return "\n".join(lines) + "\n"


def scopes_of(depth: int) -> dict[str, range]:
    """Single blocks early, in the middle and late, a group, and all."""
    singles = dict.fromkeys(round(share * (depth - 1)) for share in (0.138, 0.483, 0.862))
    group = range(round(0.4 * depth), max(round(0.4 * depth) + 1, round(0.6 * depth)))
    return {f"{k}": range(k, k + 1) for k in singles} | {f"{group[0]}-{group[-1]}": group, "all": range(depth)}


def windows_of(checkpoint: Any, text: str, length: int, count: int, skip: Tensor | None = None) -> Tensor:
    """Windows spread over a text; of those with the same start as one of `skip`'s windows none."""
    windows = read_windows(checkpoint, [text], length=length, wanted=count)
    if skip is not None:
        taken = set(map(tuple, skip.unfold(1, 8, 1).flatten(0, 1).tolist()))
        windows = windows[[tuple(row[:8].tolist()) not in taken for row in windows]]
    return windows[spread(len(windows), count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "held_out"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text, in windows of --length")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=32, help="that the predictions are taken from")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--held-out-windows", type=int, default=8)
    parser.add_argument("--predict-from", nargs="+", default=["held-out", "calibration"],
                        choices=["held-out", "calibration", "in-sample"])
    parser.add_argument("--dtype", default="bfloat16", help="of the statistics")
    parser.add_argument("--measure-dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep intermediate files here; a later run continues from them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        stream = BlockStream(checkpoint, dtype=getattr(torch, args.dtype))
        calibration = windows_of(checkpoint, args.calibration, args.length, args.tokens // args.length)
        codes = Codes(Statistics(stream, calibration, work / "calibration"), args.seed)
        scopes = scopes_of(len(codes.blocks))
        held_out = windows_of(checkpoint, args.held_out, args.length, args.held_out_windows)
        measured = measure(BlockStream(checkpoint, dtype=getattr(torch, args.measure_dtype)), held_out, codes, scopes,
                           Workspace(work / "held-out", {}))
        parts = []
        for source in args.predict_from:
            if source == "in-sample":
                sequences = calibration.reshape(-1, args.sequence_length)[:args.sequences]
            else:
                text, skip = (args.held_out, held_out) if source == "held-out" else (args.calibration, calibration)
                sequences = windows_of(checkpoint, text, args.sequence_length, args.sequences, skip=skip)
            values = Forms.of(Statistics(stream, sequences, work / f"sequences-{source}"), codes, args.seed + 1)
            parts += [f"## Predicted from sequences: {source}\n",
                      table(values, measured, codes, scopes, args.sequence_length)]
        text = "\n".join([*parts, promises(measured, codes, scopes)])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
