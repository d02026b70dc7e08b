"""What a block-wise polish of rounding and scales (SignRound's kind) would buy after the product's own solve.

    python bench/polish.py MODEL CALIBRATION_TEXT TEST_TEXT [--codec int3-g64 --blocks 4 14 25 --tokens 16384]
                           [--steps 200 --batch 2048 --rates 0.0003 0.002] [--start product nearest] [--plain]

Only these blocks are compressed. Their layers are solved, then the attention half of a block and after it the other half are
polished by AutoRound's signed gradient descent (Cheng et al. 2023, arXiv 2309.05516): with w / s = q + r, |r| < 1/2, as the
start leaves it,

    q <- round(q + r + v)  |v| <= 1/2,    s <- s (1 + a)  |a| <= 1/2       min over v, a of E w_t e_t^T B e_t,  e = y - y^

where y is what the original's half leaves in the residual stream, y^ ours on the inputs that the compressed blocks below
leave, w_t the tokens' weights and B the output Fisher of the half's last layer (stats/fisher.py); --plain takes 1 for both.
The step falls from the rate to zero, and the best v and a are kept, by the error on a quarter of the calibration windows
that no step sees. "nearest" starts from nearest rounding under searched
scales, as AutoRound does; "product" from error feedback, descent and drift correction. Printed: each half's error afterwards
as a share of that before, on the windows of the steps, on the kept quarter and on the test text, and the KL of both models.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.codecs import Coded
from supremum.gather import Gathered, gather, gather_fisher
from supremum.measure.streamed import streamed_quality
from supremum.solve.cancellation import nearest
from supremum.solve.candidates import load_coded
from supremum.solve.final import Grids, solve_final
from supremum.solve.residual import OUTPUT, writers
from supremum.stats.calls import Call
from supremum.stats.fisher import fisher_file
from supremum.stats.streaming import linears, set_weight
from supremum.stats.sweep import hidden_file, run_block
from supremum.text.windows import read_windows
from supremum.workspace import Workspace

KEPT = 4  # one of so many windows takes no part in the steps
LOOK = 20  # steps between two looks at the kept windows


class Rounded(nn.Module):
    """A layer's weight as codes and scales that a gradient moves; roundings pass it on unchanged."""

    def __init__(self, coded: Coded, original_OI: Tensor) -> None:
        super().__init__()
        self.codec = coded.codec
        codes_OI, self.grid = self.codec.unpack(coded.tensors, coded.shape)
        self.start_OI = self.codec.levels[codes_OI.long()]
        scale_OI = self._spread(self.grid.scale_OG)
        offset_OI = 0.0 if self.grid.offset_OG is None else self._spread(self.grid.offset_OG)
        self.rest_OI = ((original_OI - offset_OI) / scale_OI - self.start_OI).clamp_(-0.49, 0.49)
        self.move_OI = nn.Parameter(torch.zeros_like(original_OI))
        self.factor_OG = nn.Parameter(torch.zeros_like(self.grid.scale_OG))

    def _spread(self, value_OG: Tensor) -> Tensor:
        return value_OG.repeat_interleave(self.start_OI.shape[1] // value_OG.shape[1], 1)

    def forward(self, weight_OI: Tensor) -> Tensor:
        wish_OI = self.start_OI + self.rest_OI + self.move_OI
        level_OI = wish_OI.round().clamp(float(self.codec.levels[0]), float(self.codec.levels[-1]))
        level_OI = level_OI.detach() + (wish_OI - wish_OI.detach())
        scale_OG = self.grid.scale_OG * (1 + self.factor_OG)
        value_OI = level_OI * self._spread(scale_OG)
        return value_OI if self.grid.offset_OG is None else value_OI + self._spread(self.grid.offset_OG)

    def step(self, rate: float) -> None:
        with torch.no_grad():
            for number in (self.move_OI, self.factor_OG):
                if number.grad is not None:
                    number.sub_(number.grad.sign(), alpha=rate).clamp_(-0.5, 0.5)
                    number.grad = None

    def coded(self) -> Coded:
        """As the format stores it."""
        with torch.no_grad():
            level_OI = (self.start_OI + self.rest_OI + self.move_OI).round()
            codes_OI = (level_OI - self.codec.levels[0]).clamp_(0, len(self.codec.levels) - 1).to(torch.uint8)
            grid = self.codec.project(self.grid.scale_OG * (1 + self.factor_OG), self.grid.offset_OG)
            return Coded(self.codec, self.codec.pack(codes_OI, grid), tuple(codes_OI.shape))


class _Reached(Exception):
    """Ends a run of the block where its half ends."""


@dataclass(frozen=True)
class Half:
    """Some layers of a block, and where what they leave in the residual stream is read."""

    block: nn.Module
    call: Call
    layers: list[str]
    place: str  # a submodule, or OUTPUT

    def run(self, hidden_NTd: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Reached

        if self.place == OUTPUT:
            return self.call.run(self.block, hidden_NTd)
        handle = self.block.get_submodule(self.place).register_forward_pre_hook(stop)
        try:
            self.call.run(self.block, hidden_NTd)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]


@dataclass(frozen=True)
class Windows:
    """What enters our half, and what the original's leaves, (N, T, d), with the tokens' weights (N, T) and B (d, d)."""

    input: Tensor
    goal: Tensor
    weight: Tensor
    fisher_dd: Tensor

    def pick(self, index: Tensor) -> Windows:
        return Windows(self.input[index], self.goal[index], self.weight[index], self.fisher_dd)

    def parted(self) -> tuple[Windows, Windows]:
        """Those of the steps, and those that no step sees."""
        number = torch.arange(len(self.input))
        return self.pick(number[number % KEPT > 0]), self.pick(number[number % KEPT == 0])

    def loss(self, half: Half) -> Tensor:
        error_NTd = half.run(self.input) - self.goal
        return ((error_NTd @ self.fisher_dd * error_NTd).sum(-1) * self.weight).mean()

    def error(self, half: Half) -> float:
        """The loss of all windows, one at a time."""
        with torch.no_grad():
            return sum(float(self.pick(torch.tensor([n])).loss(half)) for n in range(len(self.input))) / len(self.input)


def halves(block: nn.Module, call: Call, hidden_NTd: Tensor) -> Iterator[Half]:
    """The layers up to each writer of the residual stream, in the order in which they run."""
    places, layers = writers(block, call, hidden_NTd[:1]), []
    for name in linears(block):
        layers.append(name)
        if name in places:
            yield Half(block, call, layers, places[name])
            layers = []


@contextmanager
def rounded(half: Half, modules: dict[str, Rounded]) -> Iterator[None]:
    for name, module in modules.items():
        parametrize.register_parametrization(half.block.get_submodule(name), "weight", module, unsafe=True)
    try:
        yield
    finally:
        for name in modules:
            parametrize.remove_parametrizations(half.block.get_submodule(name), "weight", leave_parametrized=False)


def polish(half: Half, coded: dict[str, Coded], original: Callable[[str], Tensor], data: Windows, *, steps: int, batch: int,
           rate: float) -> dict[str, Coded]:
    """The half's layers with other codes and scales, or as they were if no step served the kept windows."""
    modules = {name: Rounded(coded[name], original(name)) for name in half.layers}
    generator = torch.Generator().manual_seed(0)
    seen, kept = data.parted()
    size = max(1, batch // data.input.shape[1])
    best, least = coded, kept.error(half)
    for step in range(steps):
        with rounded(half, modules), torch.enable_grad():
            chosen = torch.randperm(len(seen.input), generator=generator)[:size]
            seen.pick(chosen).loss(half).backward()
        for module in modules.values():
            module.step(rate * (1 - step / steps))
        if (step + 1) % LOOK == 0:
            found = {name: module.coded() for name, module in modules.items()}
            put(half, found)
            if (error := kept.error(half)) < least:
                best, least = found, error
    put(half, best)
    return best


def put(half: Half, coded: dict[str, Coded]) -> None:
    for name in half.layers:
        set_weight(half.block.get_submodule(name), coded[name].decode())


def walk(gathered: Gathered, coded: dict[str, Coded], test: list[Tensor], args: argparse.Namespace,
         rate: float) -> dict[str, Coded]:
    """All halves of the chosen blocks, from below; prints each half's errors as shares of those before.

    test: what enters each block of the original, and what leaves the last, on the test windows."""
    found = dict(coded)
    ours = {"calibration": gathered.workspace.load(hidden_file(0))["h"], "test": test[0]}
    for k, call in enumerate(gathered.calls[:max(args.blocks) + 1]):
        with gathered.stream.block(call.block) as block:
            if k in args.blocks:
                theirs = {"calibration": gathered.workspace.load(hidden_file(k))["h"], "test": test[k]}
                for half, sets in prepared(gathered, k, block, theirs, ours, plain=args.plain):
                    found |= one_half(gathered, half, sets, found, args, rate)
            ours = {name: run_block(block, call, hidden_NTd) for name, hidden_NTd in ours.items()}
    return found


def prepared(gathered: Gathered, k: int, block: nn.Module, theirs: dict[str, Tensor], ours: dict[str, Tensor], *,
             plain: bool) -> list[tuple[Half, dict[str, Windows]]]:
    """The halves of a block, which has the original's weights yet, with what each should leave."""
    scores, found = gathered.workspace.load(fisher_file(k)), []
    for half in halves(block, gathered.calls[k], theirs["test"]):
        fisher_dd = gathered.fisher(gathered.calls[k].block, half.layers[-1])
        weight_NT = torch.stack([scores[f"w|{layer}"] for layer in half.layers]).square().sum(0).sqrt()
        if plain:
            fisher_dd, weight_NT = torch.eye(len(fisher_dd)), torch.ones_like(weight_NT)
        weights = {"calibration": weight_NT / weight_NT.mean(), "test": torch.ones(ours["test"].shape[:2])}
        with torch.no_grad():
            found.append((half, {name: Windows(ours[name], torch.cat([half.run(window) for window in hidden_NTd.split(1)]),
                                               weights[name], fisher_dd) for name, hidden_NTd in theirs.items()}))
    return found


def one_half(gathered: Gathered, half: Half, sets: dict[str, Windows], coded: dict[str, Coded], args: argparse.Namespace,
             rate: float) -> dict[str, Coded]:
    names = {layer: gathered.inner(half.call.block, layer) for layer in half.layers}
    shown = dict(zip(("steps", "kept"), sets["calibration"].parted(), strict=True)) | {"test": sets["test"]}
    put(half, {layer: coded[name] for layer, name in names.items()})
    before = {name: part.error(half) for name, part in shown.items()}
    better = polish(half, {layer: coded[name] for layer, name in names.items()}, lambda layer: gathered.weight(names[layer]),
                    sets["calibration"], steps=args.steps, batch=args.batch, rate=rate)
    print(f"  {half.call.block}, {', '.join(half.layers)}: error "
          + ", ".join(f"{name} {part.error(half) / before[name]:.3f}" for name, part in shown.items()), flush=True)
    return {names[layer]: one for layer, one in better.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--codec", default="int3-g64")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 14, 25])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=16, help="of the test text, as long as those of the calibration")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0003, 0.002])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--start", nargs="+", choices=("product", "nearest"), default=["product", "nearest"])
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "work", {})
        gathered = gather(checkpoint, workspace, text=[args.calibration], tokens=args.tokens, seed=0, dtype="float32")
        gather_fisher(gathered, 0)
        stream = gathered.stream
        test_NT = read_windows(checkpoint, [args.test], length=gathered.windows.shape[1], wanted=args.windows)[:args.windows]
        chosen = [f"{gathered.calls[k].block}." for k in args.blocks]
        plan = {name: args.codec for name in gathered.shapes if name.startswith(tuple(chosen))}
        files = solve_final(stream, gathered.windows, workspace, plan, gathered.weight, gathered.shapes, "product", {},
                            Grids(gathered.fisher_of))
        starts = {"product": {name: load_coded(workspace, files[name], name, args.codec, gathered.shapes[name])
                              for name in plan},
                  "nearest": {name: nearest(gathered.weight(name), codecs.get(args.codec)) for name in plan}}
        test = [torch.cat([stream.embed(window) for window in test_NT.split(1)])]
        for call in gathered.calls:
            with stream.block(call.block) as block:
                test.append(run_block(block, call, test[-1]))

        def kl(coded: dict[str, Coded]) -> str:
            quality = streamed_quality(stream, test_NT, test[-1],
                                       lambda name: coded[name].decode() if name in coded else None)
            return f"KL {quality.kl_mean:.5f} +- {quality.kl_se:.5f}"

        for start in args.start:
            print(f"{args.codec} from {start}: {kl(starts[start])}", flush=True)
            for rate in args.rates:
                spent = time.process_time()
                better = walk(gathered, starts[start], test, args, rate)
                print(f"{args.codec} from {start}, {args.steps} steps of {args.batch} tokens, rate {rate:g}: {kl(better)}, "
                      f"{time.process_time() - spent:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
