"""Prices against the truth: what one layer in one format costs, by K-FAC and by the sequences' own scores, and measured.

    python bench/prices.py MODEL TEXT [--tokens 4096] [--blocks 1 9 17 25] [--measured 3072] [--seed 0]

Every layer of the chosen blocks is solved in every format of the GGUF menu that holds it. Prices, nats a token:

    K-FAC       1/2 tr(B dW S dW^T)
    coupled     c times that, c the layer's coupling (stats/fisher.py): what `optimize` allocates by
    sequence    1/2 E_s[(sum_t g_t . dW x_t)^2] / T         exact to second order but for its sampling

S, B and the scores come from the calibration windows; the truth is the KL in float32 on other windows of the text, with
nothing but this layer changed. Printed: each row, then price over truth (geometric mean and the factor of one standard
deviation), and the truth of the plans that each price chooses among these layers at several bits a weight.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from supremum import codecs
from supremum.allocate import Option, Unit, choose
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import target
from supremum.gather import Gathered, gather, gather_fisher, solve_candidates
from supremum.planning import menu_of
from supremum.prices import damages, measured_alone
from supremum.progress import track
from supremum.solve.candidates import Candidates
from supremum.stats.fisher import score
from supremum.stats.streaming import linears
from supremum.stats.sweep import hidden_file
from supremum.text.pairs import answering
from supremum.workspace import Workspace

BITS = (4.3, 4.4, 4.5, 4.75, 5.0, 5.5, 6.0, 7.0)  # a weight, of the plans
FORMS = ("K-FAC", "coupled", "sequence", "measured")


def sequence_prices(gathered: Gathered, candidates: Candidates, blocks: list[str], seed: int) -> dict[tuple[str, str], float]:
    """One backward pass a window through the model as the stream gives it, block by block."""
    stream, calls, windows_NT = gathered.stream, gathered.calls, gathered.windows
    answers_NT, products = answering(windows_NT), defaultdict(list)
    for n in track(range(len(windows_NT)), "score the sequences"):
        state_NTd = gathered.workspace.load(hidden_file(len(calls)))["h"][n:n + 1].requires_grad_(True)
        with stream.head() as head, torch.enable_grad():
            output = head(state_NTd[:, answers_NT[n]])
            upper = score(output, torch.Generator().manual_seed(seed * 1_000_003 + n))
            gradient_NTd = torch.autograd.grad(output, state_NTd, upper)[0]
        for k in range(len(calls) - 1, min(k for k, call in enumerate(calls) if call.block in blocks) - 1, -1):
            entry_NTd = gathered.workspace.load(hidden_file(k))["h"][n:n + 1].detach().requires_grad_(True)
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            with stream.block(calls[k].block) as block, torch.enable_grad():
                handles = [layer.register_forward_hook(
                    lambda module, args, out, name=name, seen=seen: seen.update({name: (args[0], out)}))
                    for name, layer in linears(block).items()]
                result = calls[k].at(slice(n, n + 1)).run(block, entry_NTd)
                wanted = {name: out for name, (_, out) in seen.items()} if calls[k].block in blocks else {}
                gradient_NTd, *g = torch.autograd.grad(result, [entry_NTd, *wanted.values()], gradient_NTd)
                for handle in handles:
                    handle.remove()
            for name, g_1TO in zip(wanted, g, strict=True):
                sum_OI = g_1TO[0].float().T @ seen[name][0][0].detach().float()
                tensor = gathered.inner(calls[k].block, name)
                for codec in candidates.menu[tensor]:
                    change_OI = candidates.get(tensor, codec).decode() - gathered.weight(tensor)
                    products[tensor, codec].append(float((sum_OI * change_OI).sum()))
    length = int(answers_NT.sum()) / len(windows_NT)
    return {key: 0.5 * sum(v * v for v in values) / len(values) / length for key, values in products.items()}


def plans(menu: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, int]],
          nats: Mapping[str, Mapping[tuple[str, str], float]]) -> Iterator[tuple[float, dict[str, float]]]:
    """Bits a weight -> form -> measured nats of the plan that the form chooses."""
    weights = sum(math.prod(shapes[name]) for name in menu)
    for bits in BITS:
        row = {}
        for form in FORMS:
            units = [Unit((name,), math.prod(shapes[name]), True,
                          tuple(Option(codec, codecs.get(codec).nbytes(shapes[name]), nats[form][name, codec])
                                for codec in names)) for name, names in menu.items()]
            if sum(min(o.nbytes for o in unit.options) for unit in units) > bits * weights / 8:
                break
            chosen = choose(units, size=None, block_bytes=bits * weights / 8, nats=None)
            row[form] = sum(nats["measured"][unit.tensors[0], option.codec]
                            for unit, option in zip(units, chosen, strict=True))
        if row:
            yield bits, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 9, 17, 25])
    parser.add_argument("--measured", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, kind = open_checkpoint(args.model), target("gguf")
        gathered = gather(checkpoint, Workspace(Path(folder), {}), text=[args.text], tokens=args.tokens, seed=args.seed,
                          dtype="auto")
        blocks = [block for k, block in enumerate(gathered.stream.blocks) if k in args.blocks]
        usual = menu_of(kind, checkpoint, gathered.shapes, []).codecs
        menu = {name: names if any(name.startswith(f"{block}.") for block in blocks) else [] for name, names in usual.items()}
        gather_fisher(gathered, args.seed)
        candidates = solve_candidates(gathered, menu)
        coupled = damages(gathered, menu, lambda name, codec: candidates.get(name, codec).decode(), "prices")
        coupling = {gathered.inner(block, layer): gathered.coupling(block, layer)
                    for block in blocks for layer in linears(gathered.stream.blocks[block])}
        nats = {"K-FAC": {key: value / coupling[key[0]] for key, value in coupled.items()}, "coupled": coupled,
                "sequence": sequence_prices(gathered, candidates, blocks, args.seed)}
        chosen = {name: names for name, names in menu.items() if names}
        truth = measured_alone(gathered, candidates, chosen, "measured", tokens=args.measured)
        nats["measured"] = {key: max(kl, 1e-9) for key, kl in truth.items()}
    print("| layer | format | K-FAC | coupled | sequence | measured KL |\n|---|---|---|---|---|---|")
    for name, codec in nats["K-FAC"]:
        print(f"| {name} | {codec} | {' | '.join(f'{nats[form][name, codec]:.6f}' for form in FORMS)} |")
    print("\n| price | over measured | within a layer |\n|---|---|---|")
    for form in FORMS[:3]:
        logs = {key: math.log(max(value, 1e-12) / nats["measured"][key]) for key, value in nats[form].items()}
        means = {name: sum(logs[name, codec] for codec in names) / len(names) for name, names in menu.items() if names}
        mean = sum(logs.values()) / len(logs)
        spread = math.sqrt(sum((value - mean) ** 2 for value in logs.values()) / len(logs))
        inside = math.sqrt(sum((value - means[name]) ** 2 for (name, _), value in logs.items()) / len(logs))
        print(f"| {form} | {math.exp(mean):.2f}, x {math.exp(spread):.2f} | x {math.exp(inside):.2f} |")
    print("\n| bits a weight | nats of the plan by K-FAC | coupled | by sequences | by measurement |\n|---|---|---|---|---|")
    for bits, row in plans(chosen, gathered.shapes, nats):
        print(f"| {bits:g} | {' | '.join(f'{row[form]:.5f}' for form in FORMS)} |")


if __name__ == "__main__":
    main()
