"""The codes of the founding experiment: every block's weights in each of them, made from one text's statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from supremum import codecs
from supremum.limits import Curve, LayerSpectrum, metric
from supremum.limits.waterfill import level_of_rate
from supremum.progress import track
from supremum.solve import Metric, nearest, solve_together
from supremum.stats.fisher import fisher, fisher_file
from supremum.stats.streaming import BlockStream, orientation
from supremum.stats.sweep import moments, sweep
from supremum.workspace import Workspace

NEAREST, FEEDBACK = ("int5-g64", "int4-g64", "int3-g64"), ("int4-g64", "int3-g64", "int2-g64")
IDEAL, LIMIT = (4, 3, 2), (4, 3)
CODES = [f"nearest {c}" for c in NEAREST] + [f"feedback {c}" for c in FEEDBACK] + \
    [f"ideal layer {b} bits" for b in IDEAL] + [f"limit {b} bits" for b in LIMIT]


class Statistics:
    """A sweep and its workspace: hidden states, moments and (once gathered) the output Fisher."""

    def __init__(self, stream: BlockStream, windows: Tensor, folder: Path) -> None:
        self.stream, self.windows, self.workspace = stream, windows, Workspace(folder, {})
        sweep(stream, windows, self.workspace)
        self.calls = stream.calls(windows)

    def moments(self, block: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        return moments(self.workspace, self.calls, block)

    def output_fisher(self, block: str) -> dict[str, Tensor]:
        k = next(k for k, call in enumerate(self.calls) if call.block == block)
        return {key.removeprefix("B|"): value for key, value in self.workspace.load(fisher_file(k)).items()
                if key.startswith("B|")}


class Codes:
    """Every block's weights in every code, float16 on disk; made from the calibration text's statistics."""

    def __init__(self, statistics: Statistics, seed: int) -> None:
        self.statistics, self.seed = statistics, seed
        self.oriented = orientation(statistics.stream)
        self.blocks = list(statistics.stream.blocks)
        fisher(statistics.stream, statistics.windows, statistics.workspace,
               length=statistics.windows.shape[1], seed=seed)
        spectra = [s for block in track(self.blocks, "eigenbases") for s in self._eigen(block)]
        self.limit = {bits: Curve(spectra).level_at_bits(bits) for bits in LIMIT}
        self.promised = {bits: dict(zip([s.name for s in spectra], Curve(spectra).layer_kl(level), strict=True))
                         for bits, level in self.limit.items()}
        for block in track(self.blocks, "make the codes"):
            statistics.workspace.tensors(self._file(block), lambda block=block: self._make(block))

    def weight(self, name: str) -> Tensor:
        weight = self.statistics.stream.checkpoint.read(name).float()
        return weight.T.contiguous() if self.oriented[name][1] else weight

    def read(self, block: str, code: str) -> dict[str, Tensor]:
        """Tensor name -> weight (O, I) of one block in one code."""
        file = self._file(block)
        keys = [key for key in self.statistics.workspace.keys(file) if key.endswith(f"|{code}")]
        return {key.rsplit("|", 1)[0]: w.float() for key, w in self.statistics.workspace.load(file, keys).items()}

    def _file(self, block: str, kind: str = "codes") -> str:
        return f"{kind}/{self.blocks.index(block):04d}.safetensors"

    def _eigen(self, block: str) -> list[LayerSpectrum]:
        """Spectra of the block's layers; their eigenbases are left on disk."""
        sums, keys = self.statistics.moments(block)
        tokens = self.statistics.windows.numel()

        def compute() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            sides = {f"S|{key}": metric(total, tokens=tokens).moment_II.float() for key, total in sums.items()}
            for name, form in (sides | {f"B|{n}": b for n, b in self.statistics.output_fisher(block).items()}).items():
                found[f"values|{name}"], found[f"vectors|{name}"] = torch.linalg.eigh(form)
            return found

        found = self.statistics.workspace.tensors(self._file(block, "eigen"), compute)
        return [LayerSpectrum(name := f"{block}.{layer}.weight", self.oriented[name][0],
                              float(self.weight(name).square().mean()), found[f"values|S|{key}"].double().clamp_min(0),
                              found[f"values|B|{layer}"].double().clamp_min(0), tokens) for layer, key in keys.items()]

    def _make(self, block: str) -> dict[str, Tensor]:
        workspace = self.statistics.workspace
        sums, keys = self.statistics.moments(block)
        eigen = workspace.load(self._file(block, "eigen"))
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.blocks.index(block))
        made: dict[str, Tensor] = {}
        for key in sums:
            weights = {f"{block}.{layer}.weight": self.weight(f"{block}.{layer}.weight")
                       for layer, own in keys.items() if own == key}
            ready = Metric.of(sums[key], damping=0.01)
            for codec in FEEDBACK:
                solved = solve_together(weights, ready, codecs.get(codec), refits=0)
                made |= {f"{name}|feedback {codec}": coded.decode() for name, coded in solved.items()}
            for name, weight_OI in weights.items():
                layer = name.removeprefix(f"{block}.").removesuffix(".weight")
                made |= {f"{name}|nearest {codec}": nearest(weight_OI, codecs.get(codec)).decode() for codec in NEAREST}
                variance = float(weight_OI.square().mean())
                alpha_I, inputs_II = eigen[f"values|S|{key}"].clamp_min(0), eigen[f"vectors|S|{key}"]
                beta_O, outputs_OO = eigen[f"values|B|{layer}"].clamp_min(0), eigen[f"vectors|B|{layer}"]
                for bits in IDEAL:
                    k_I = (level_of_rate(variance * alpha_I.double(), bits) / (variance * alpha_I)).clamp(max=1.0)
                    made[f"{name}|ideal layer {bits} bits"] = _channel(weight_OI @ inputs_II, k_I, variance,
                                                                       generator) @ inputs_II.T
                for bits in LIMIT:
                    k_OI = (2 ** self.limit[bits] / (variance * beta_O[:, None] * alpha_I)).clamp(max=1.0)
                    made[f"{name}|limit {bits} bits"] = outputs_OO @ _channel(
                        outputs_OO.T @ weight_OI @ inputs_II, k_OI, variance, generator) @ inputs_II.T
        return {key: weight.half() for key, weight in made.items()}


def _channel(component: Tensor, k: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    """What the ideal Gaussian code at distortion k s^2 puts in a component's place."""
    noise = torch.randn(component.shape, generator=generator)
    return (1 - k) * component + (k * (1 - k) * variance).sqrt() * noise
