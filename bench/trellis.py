"""How much of the scalar lattice's 0.2546 bit an entropy-coded trellis takes, in coded bytes.

    python bench/trellis.py                                       synthetic: iid Gaussian, gap to the rate-distortion bound
    python bench/trellis.py MODEL TEXT [--blocks 4 14 25 --tokens 4096]     and real layers, both feedbacks at work

Dependent quantisation (Marcellin & Fischer 1990; Fischer & Wang 1992; in VVC with 4 states): a weight is m Delta, and of two
quantisers the state says which may be used, Q0 = {2k} or Q1 = {2k - sgn k}. The parity of k moves the state. Ungerboeck's
codes for amplitude modulation (parity checks h0, h1), in observer form, with r_1 the bit that names the quantiser:

    r_j <- r_{j+1} + h0_j r_1 + h1_j parity (mod 2),   r_{n+1} = 0

The best sequence of a row is Viterbi's under (u - m)^2 + rate bits(k), u the wish in steps. Every survivor carries the errors
of its own last columns (what is older than WINDOW is the best survivor's), so that feedback along columns and between rows
stays what it is in solve/water.py. The coder has a table for each class and quantiser; its LANES follow a row each, since
the table of the next integer waits for this one's parity.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from scipy.stats import norm

from supremum.checkpoint import open_checkpoint
from supremum.codecs import rans
from supremum.codecs.lattice import CLASSES, OCTAVE, UNIT
from supremum.codecs.rans import ESCAPE, LANES, LARGEST, LOWEST, PRECISION, TOTAL
from supremum.gather import gather, gather_fisher
from supremum.limits import Curve
from supremum.solve.cancellation import DAMPING, Metric, damped
from supremum.solve.water import BLOCK, MAGNITUDES, Outputs, Spread, Watered, _held, water
from supremum.stats.sweep import moments
from supremum.workspace import Workspace

CHECKS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10)}  # Ungerboeck 1982, one dimension
GRANULAR = {4: 0.99, 8: 1.09, 16: 1.16, 32: 1.22}  # dB over the integers, of a uniform source (Marcellin & Fischer 1990)
WINDOW = 64  # columns in which survivors differ
OUTPUT_DAMPING = 0.01  # as in fill.py


def transitions(states: int) -> NDArray[np.int64]:
    """(states, 2): the next state by parity; a state's lowest bit names its quantiser."""
    h0, h1 = CHECKS[states]
    table = np.empty((states, 2), np.int64)
    for state in range(states):
        for parity in range(2):
            table[state, parity] = state >> 1 ^ (state & 1) * (h0 >> 1) ^ parity * (h1 >> 1)
    return table


def prior_bits() -> NDArray[np.float32]:
    """(2 CLASSES, MAGNITUDES) bits of k, sign included; row 2 class + quantiser: a normal whose cells end between points."""
    sigma_K1 = 2.0 ** ((np.arange(CLASSES) - UNIT) / OCTAVE)[:, None]
    k = np.arange(MAGNITUDES)
    bits = np.empty((CLASSES, 2, MAGNITUDES), np.float32)
    for quantiser in range(2):
        point = 2 * k - quantiser * (k > 0)
        edge = np.append((point[:-1] + point[1:]) / 2, 2 * MAGNITUDES)
        mass = norm.sf(np.append(-edge[0], edge[:-1]) / sigma_K1) - norm.sf(edge / sigma_K1)
        bits[:, quantiser] = -np.log2(np.maximum(mass, 2.0**-24))
    return bits.reshape(2 * CLASSES, MAGNITUDES)


def counted_bits(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """The same from (2 CLASSES, 256) counts, with eight symbols' worth of the normal's."""
    both = counts[:, ESCAPE:ESCAPE + MAGNITUDES].astype(float)
    both[:, 1:] += counts[:, ESCAPE - 1:0:-1]
    prior = 2.0 ** -prior_bits()
    prior[:, 1:] *= 2
    mass = (both + 8 * prior) / (both.sum(1, keepdims=True) + 8)
    mass[:, 1:] /= 2
    return np.asarray(-np.log2(np.maximum(mass, 2.0**-24)), np.float32)


# --- solving ---------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def viterbi(work_BI, shares_BB, lower_II, step_B, step_I, class_B, class_I, bits_KM, rate, next_S2, k_BI, error_BI):
    """A block of rows as in water._round. Fills k and the errors of the rows."""
    rows, columns, states = work_BI.shape[0], work_BI.shape[1], next_S2.shape[0]
    last, largest = bits_KM.shape[0] // 2 - 1, bits_KM.shape[1] - 2
    wish_I, decided_I = np.empty(columns, np.float32), np.empty(columns, np.float32)
    recent = np.empty((2, states, columns), np.float32)
    cost_S, new_S = np.empty(states, np.float64), np.empty(states, np.float64)
    from_S, parity_S = np.empty(states, np.int64), np.empty(states, np.int64)
    pick_S2, value_S2 = np.empty((states, 2), np.int16), np.empty((states, 2), np.float32)
    charge_S2, wish_S = np.empty((states, 2), np.float64), np.empty(states, np.float32)
    came_IS, chosen_IS = np.empty((columns, states), np.int8), np.empty((columns, states), np.int16)
    for o in range(rows):
        wish_I[:] = work_BI[o]
        if len(shares_BB):
            for p in range(o):
                share = shares_BB[p, o]
                for i in range(columns):
                    wish_I[i] -= share * error_BI[p, i]
        cost_S[:] = np.inf
        cost_S[0] = 0
        now = 0
        for i in range(columns):
            lower_I = lower_II[i]
            old = max(i - WINDOW, 0)
            if i > WINDOW:
                best = np.argmin(cost_S)
                decided_I[old - 1] = recent[now, best, old - 1]
            common = np.float32(0)
            for t in range(old):
                common += decided_I[t] * lower_I[t]
            step = step_B[o] * step_I[i]
            k_class = min(max(class_B[o] + class_I[i], 0), last)
            for s in range(states):
                charge_S2[s, 0] = charge_S2[s, 1] = np.inf
                if cost_S[s] == np.inf:
                    continue
                passed, own_I = common, recent[now, s]
                for t in range(old, i):
                    passed += own_I[t] * lower_I[t]
                wish = wish_I[i] - passed
                wish_S[s] = wish
                size = min(abs(wish) / step, np.float32(32000))
                quantiser = s & 1
                below = (int(size) + quantiser) >> 1  # the last k whose point is not above the wish
                for k in range(max(below - 1, 0), below + 2):
                    point = 2 * k - (1 if quantiser and k > 0 else 0)
                    price = bits_KM[2 * k_class + quantiser, k] if k <= largest else np.float32(44)
                    charge = cost_S[s] + (size - point) ** 2 + rate * price
                    if charge < charge_S2[s, k & 1]:
                        charge_S2[s, k & 1] = charge
                        pick_S2[s, k & 1] = -k if wish < 0 else k
                        value_S2[s, k & 1] = np.float32(-point if wish < 0 else point) * step
            new_S[:] = np.inf
            for s in range(states):
                for parity in range(2):
                    to = next_S2[s, parity]
                    if charge_S2[s, parity] < new_S[to]:
                        new_S[to], from_S[to], parity_S[to] = charge_S2[s, parity], s, parity
            for to in range(states):
                if new_S[to] < np.inf:
                    s, parity = from_S[to], parity_S[to]
                    came_IS[i, to], chosen_IS[i, to] = s, pick_S2[s, parity]
                    source, target = recent[now, s], recent[1 - now, to]
                    for t in range(old, i):
                        target[t] = source[t]
                    target[i] = (wish_S[s] - value_S2[s, parity]) / lower_I[i]
            cost_S[:] = new_S
            now = 1 - now
        state = np.argmin(cost_S)
        for i in range(columns - 1, -1, -1):
            k_BI[o, i] = chosen_IS[i, state]
            state = came_IS[i, state]
            k = k_BI[o, i]
            point = 2 * k - (0 if k == 0 or not state & 1 else (1 if k > 0 else -1))
            error_BI[o, i] = wish_I[i] - np.float32(point) * (step_B[o] * step_I[i])


@njit(cache=True, nogil=True)
def follow(k_OI, next_S2):
    """The quantiser of each integer, in the order of the columns given."""
    quantiser_OI = np.empty(k_OI.shape, np.uint8)
    for o in range(k_OI.shape[0]):
        state = 0
        for i in range(k_OI.shape[1]):
            quantiser_OI[o, i] = state & 1
            state = next_S2[state, k_OI[o, i] & 1]
    return quantiser_OI


class Trellised:
    """One matrix, columns in the solver's order: k, its quantisers, classes, and what it decodes to in natural order."""

    def __init__(self, weight_OI: torch.Tensor, metric: Metric, outputs: Outputs, level: float, spread: Spread, *,
                 states: int, bits_KM: NDArray[np.float32]) -> None:
        distortion = 10 ** (-GRANULAR[states] / 10) / 3  # of Delta^2, at high rate
        pivot_I = metric.factor_II.diagonal().double()
        row_O = _held(OCTAVE * (0.5 * math.log2(level / distortion) + outputs.pivot_O.double().log2()))
        column_I = _held(OCTAVE * pivot_I.log2())
        rows, columns = outputs.order_O, metric.order_I
        self.row_O = _held(spread.row_O[rows] - row_O).short().numpy()
        self.column_I = (_held(spread.column_I[columns] - column_I).short() + UNIT).numpy()
        step_O, step_I = ((v / OCTAVE).exp2().float().numpy() for v in (row_O, column_I))
        work_OI = weight_OI[rows][:, columns].contiguous()
        self.next = transitions(states)
        self.k_OI = np.empty(work_OI.shape, np.int16)
        lower_II = np.ascontiguousarray(metric.factor_II.numpy().T)
        for begin in range(0, len(work_OI), BLOCK):
            part = slice(begin, min(begin + BLOCK, len(work_OI)))
            shares = outputs.shares_OO
            shares_BB = np.zeros((0, 0), np.float32) if shares is None else shares[part, part].numpy()
            error_BI = np.empty((part.stop - begin, len(columns)), np.float32)
            viterbi(work_OI.numpy()[part], shares_BB, lower_II, step_O[part], step_I, self.row_O[part], self.column_I,
                    bits_KM, np.float64(2 * math.log(2) * distortion), self.next, self.k_OI[part], error_BI)
            if shares is not None and part.stop < len(work_OI):
                work_OI[part.stop:].addmm_(shares[part, part.stop:].T, torch.from_numpy(error_BI), alpha=-1)
        self.quantiser_OI = follow(self.k_OI, self.next)
        points_OI = 2 * self.k_OI - np.sign(self.k_OI) * self.quantiser_OI
        self.decoded = torch.empty(work_OI.shape)
        self.decoded[rows[:, None], columns] = torch.from_numpy(points_OI.astype(np.float32) * step_O[:, None] * step_I)

    @property
    def table_OI(self) -> NDArray[np.int64]:
        """The table of each integer."""
        return 2 * np.clip(self.row_O[:, None].astype(np.int64) + self.column_I, 0, CLASSES - 1) + self.quantiser_OI

    @property
    def symbol_OI(self) -> NDArray[np.uint8]:
        return np.where(np.abs(self.k_OI) > LARGEST, 0, self.k_OI + ESCAPE).astype(np.uint8)

    def counts(self) -> NDArray[np.int64]:
        return np.bincount((self.table_OI * 256 + self.symbol_OI).ravel(), minlength=2 * CLASSES * 256).reshape(-1, 256)


# --- coding ----------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def push(symbol_OI, table_OI, frequency_KA, cumulative_KA, words):
    """rans._push with LANES rows side by side."""
    rows, columns = symbol_OI.shape
    at, states = len(words), np.full(LANES, LOWEST, np.uint64)
    for begin in range((rows - 1) // LANES * LANES, -1, -LANES):
        for i in range(columns - 1, -1, -1):
            for lane in range(min(LANES, rows - begin) - 1, -1, -1):
                k, symbol, x = table_OI[begin + lane, i], symbol_OI[begin + lane, i], states[lane]
                frequency = np.uint64(frequency_KA[k, symbol])
                if x >= frequency << np.uint64(63 - PRECISION):
                    at -= 1
                    words[at] = np.uint32(x & np.uint64(0xFFFFFFFF))
                    x >>= np.uint64(32)
                quotient = x // frequency
                states[lane] = (quotient << np.uint64(PRECISION)) + (x - quotient * frequency) \
                    + np.uint64(cumulative_KA[k, symbol])
    for lane in range(LANES - 1, -1, -1):
        at -= 2
        words[at] = np.uint32(states[lane] >> np.uint64(32))
        words[at + 1] = np.uint32(states[lane] & np.uint64(0xFFFFFFFF))
    return at


@njit(cache=True, nogil=True)
def pop(words, row_O, column_I, table_KT, next_S2, points_OI):
    """Fill the points m; whether the stream ended where it should."""
    rows, columns = points_OI.shape
    last = table_KT.shape[0] // 2 - 1
    states, trellis = np.empty(LANES, np.uint64), np.zeros(LANES, np.int64)
    for lane in range(LANES):
        states[lane] = np.uint64(words[2 * lane]) << np.uint64(32) | np.uint64(words[2 * lane + 1])
    at, end = 2 * LANES, len(words)
    for begin in range(0, rows, LANES):
        trellis[:] = 0
        height = min(LANES, rows - begin)
        for i in range(columns):
            for lane in range(height):
                state, x = trellis[lane], states[lane]
                k = min(max(row_O[begin + lane] + column_I[i], 0), last)
                entry = table_KT[2 * k + (state & 1), x & np.uint64(TOTAL - 1)]
                z = np.int64(entry & np.uint32(255)) - ESCAPE
                points_OI[begin + lane, i] = 2 * z - (state & 1) * ((z > 0) - (z < 0))
                trellis[lane] = next_S2[state, z & 1]
                x = np.uint64(((entry >> np.uint32(8)) & np.uint32(4095)) + np.uint32(1)) * (x >> np.uint64(PRECISION)) \
                    + np.uint64(entry >> np.uint32(20))
                if x < LOWEST:
                    if at == end:
                        return False
                    x = x << np.uint64(32) | np.uint64(words[at])
                    at += 1
                states[lane] = x
    for lane in range(LANES):
        if states[lane] != LOWEST:
            return False
    return at == end


def frequencies(counts: NDArray[np.int64]) -> rans.Frequencies:
    """As the archive makes them."""
    weights = counts.astype(float)
    weights[:, [0, ESCAPE]] = np.maximum(weights[:, [0, ESCAPE]], 0.5)
    return rans.quantised(weights)


def coded(symbol_OI: NDArray[np.uint8], table_OI: NDArray[np.int64], frequency_KA: rans.Frequencies) -> NDArray[np.uint32]:
    cumulative_KA = np.cumsum(frequency_KA, 1, dtype=np.uint32) - frequency_KA
    words = np.empty(symbol_OI.size + 2 * LANES, np.uint32)
    return words[push(symbol_OI, table_OI, frequency_KA.astype(np.uint32), cumulative_KA.astype(np.uint32), words):].copy()


def entropy(counts: NDArray[np.int64]) -> float:
    """Bits of all symbols at their entropy within each table."""
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    return float(-(counts * np.log2(np.maximum(counts, 1) / total)).sum())


def scalar_parts(found: Watered) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Symbols, tables and counts of today's integers."""
    z_OI, frame = found.lattice.integers_OI.numpy(), found.lattice.frame
    symbol_OI = np.where(np.abs(z_OI) > LARGEST, 0, z_OI + ESCAPE).astype(np.uint8)
    table_OI = np.clip(frame.row_class_O.numpy()[:, None].astype(np.int64) + frame.column_class_I.numpy(), 0, CLASSES - 1)
    return symbol_OI, table_OI, np.bincount((table_OI * 256 + symbol_OI).ravel(), minlength=CLASSES * 256).reshape(-1, 256)


# --- tables ----------------------------------------------------------------------------------------------------------


def synthetic(size: int) -> None:
    """Gap in bits a weight to log2(1 / D) / 2 of iid N(0, 1)."""
    weight_OI = torch.randn(size, 512, generator=torch.Generator().manual_seed(0))
    metric = Metric(torch.eye(512), torch.arange(512), torch.eye(512))
    outputs = Outputs(torch.arange(size), torch.ones(size, dtype=torch.float64), None)
    spread = Spread(torch.zeros(size, dtype=torch.float64), torch.zeros(512, dtype=torch.float64))
    print("| bits | code | bits coded | gap, entropy | gap, coded | taken of the scalar gap |\n|---|---|---|---|---|---|",
          flush=True)
    power = float(weight_OI.double().square().mean())
    for wanted in (1.5, 2.0, 3.0, 4.0):
        base = 0.0
        for states in (0, *CHECKS):
            level, bits_KM = 4.0 ** (0.2 - wanted), prior_bits()
            for _ in range(5):  # the level that gives the bits; for the trellis also tables as counted
                if states:
                    found = Trellised(weight_OI, metric, outputs, level, spread, states=states, bits_KM=bits_KM)
                    counts, decoded = found.counts(), found.decoded
                    symbol_OI, table_OI, bits_KM = found.symbol_OI, found.table_OI, counted_bits(counts)
                else:
                    scalar = water(weight_OI, metric, outputs, level, spread)
                    symbol_OI, table_OI, counts = scalar_parts(scalar)
                    decoded = scalar.decode()
                ideal = entropy(counts) / weight_OI.numel()
                level *= 4.0 ** (ideal - wanted)
            real = 32 * len(coded(symbol_OI, table_OI, frequencies(counts))) / weight_OI.numel()
            bound = -0.5 * math.log2(float((decoded - weight_OI).double().square().mean()) / power)
            base = base or real - bound
            label = f"trellis, {states} states" if states else "integers"
            print(f"| {wanted} | {label} | {real:.3f} | {ideal - bound:.3f} | {real - bound:.3f} | "
                  f"{base - (real - bound):.3f} |", flush=True)


def damage(change_OI: torch.Tensor, metric: Metric, fisher: torch.Tensor) -> float:
    """tr(B dW S dW^T) / 2 of the damped metrics, float64."""
    change_OI, moment_II = change_OI.double(), metric.moment_II.double()
    return float((damped(fisher.float(), OUTPUT_DAMPING).double() * (change_OI @ moment_II @ change_OI.T)).sum()) / 2


def real(args: argparse.Namespace) -> None:
    """Coded bits at equal damage. All layers share the tables of frequencies, whose bytes (zlib) are not in the bits."""
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Workspace(Path(scratch) / "work", {})
        gathered = gather(open_checkpoint(args.model), workspace, text=[args.text], tokens=args.tokens, seed=0, dtype="auto")
        gather_fisher(gathered, None, 0)
        curve = Curve(list(gathered.spectra()))
        layers = []
        for number in args.blocks:
            block = list(gathered.stream.blocks)[number]
            sums, keys = moments(workspace, gathered.calls, block)
            metrics = {key: Metric.of(total, damping=DAMPING) for key, total in sums.items()}
            for layer, key in keys.items():
                weight_OI = gathered.weight(gathered.inner(block, layer))
                fisher = gathered.fisher(block, layer)
                layers.append((weight_OI, metrics[key], fisher, Outputs.of(fisher, OUTPUT_DAMPING), Spread.of(weight_OI)))
    weights = sum(layer[0].numel() for layer in layers)

    def integers(level: float) -> tuple[float, float, float]:
        """(bits a weight, damage, seconds of solving)."""
        start = time.perf_counter()
        found = [water(w, metric, outputs, level, spread) for w, metric, _, outputs, spread in layers]
        seconds = time.perf_counter() - start
        parts = [scalar_parts(one) for one in found]
        table = frequencies(sum(part[2] for part in parts))
        words = [rans.encode(part[0], one.lattice.frame.row_class_O.numpy(), one.lattice.frame.column_class_I.numpy(), table)
                 for part, one in zip(parts, found, strict=True)]
        nats = sum(damage(one.decode() - w, metric, fisher)
                   for one, (w, metric, fisher, *_) in zip(found, layers, strict=True))
        _decode_speed("integers", [(word, one.lattice.frame.row_class_O.numpy(), one.lattice.frame.column_class_I.numpy())
                                   for word, one in zip(words, found, strict=True)], table, None)
        escapes = sum(int((part[0] == 0).sum()) for part in parts)
        return (32 * sum(map(len, words)) + 16 * escapes) / weights, nats, seconds

    def trellis(level: float, states: int, bits_KM: NDArray[np.float32]) -> tuple[float, float, float, NDArray[np.float32]]:
        start = time.perf_counter()
        found = [Trellised(w, metric, outputs, level, spread, states=states, bits_KM=bits_KM)
                 for w, metric, _, outputs, spread in layers]
        seconds = time.perf_counter() - start
        counts = sum(one.counts() for one in found)
        table = frequencies(counts)
        words = [coded(one.symbol_OI, one.table_OI, table) for one in found]
        nats = sum(damage(one.decoded - w, metric, fisher)
                   for one, (w, metric, fisher, *_) in zip(found, layers, strict=True))
        streams = [(word, one.row_O, one.column_I) for word, one in zip(words, found, strict=True)]
        _decode_speed(f"trellis, {states} states", streams, table, found)
        escapes = sum(int((one.symbol_OI == 0).sum()) for one in found)
        return (32 * sum(map(len, words)) + 16 * escapes) / weights, nats, seconds, counted_bits(counts)

    print(f"\n{weights} weights of {len(layers)} layers\n\n| code | bits | damage | bits saved at equal damage | solved in s "
          "|\n|---|---|---|---|---|", flush=True)
    for wanted in args.bits:
        level = 2.0 ** curve.level_at_bits(wanted - 0.5)
        near = [integers(level), integers(level * 4**0.3)]
        slope = (near[0][0] - near[1][0]) / math.log2(near[1][1] / near[0][1])  # bits an octave of damage
        print(f"| integers | {near[0][0]:.3f} | {near[0][1]:.5g} | | {near[0][2]:.1f} |", flush=True)
        for states in args.states:
            bits_KM, factor = prior_bits(), 1.0
            for tables in ("normal", "counted"):
                bits, nats, seconds, counted = trellis(level * factor, states, bits_KM)
                saved = near[0][0] - bits - slope * math.log2(nats / near[0][1])
                label = f"trellis, {states} states, {tables} tables"
                print(f"| {label} | {bits:.3f} | {nats:.5g} | {saved:.3f} | {seconds:.1f} |", flush=True)
                bits_KM, factor = counted, factor * near[0][1] / nats
    print("\nDecoding, one core: " + "; ".join(f"{k} {max(v):.0f} MB/s of bfloat16" for k, v in SPEEDS.items()))


SPEEDS: dict[str, list[float]] = {}


def _decode_speed(label: str, streams: list, frequency_KA: rans.Frequencies, found: list[Trellised] | None) -> None:
    """To integers; the trellis's are compared with what was coded."""
    table, took, size = rans.decoding_table(frequency_KA), 0.0, 0
    for n, (words, row_O, column_I) in enumerate(streams):
        for attempt in range(2):  # the first may compile
            start = time.perf_counter()
            if found is None:
                rans.decode(words, row_O, column_I, table)
            else:
                points_OI = np.empty((len(row_O), len(column_I)), np.int16)
                good = pop(words, row_O, column_I, table, found[n].next, points_OI)
            if attempt:
                took, size = took + time.perf_counter() - start, size + len(row_O) * len(column_I)
        if found is not None and (np.abs(found[n].k_OI) <= LARGEST).all():  # an escape's parity is not in this stream
            wanted_OI = 2 * found[n].k_OI - np.sign(found[n].k_OI) * found[n].quantiser_OI
            assert good and (points_OI == wanted_OI).all(), label
    SPEEDS.setdefault(label, []).append(2 * size / took / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 14, 25])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.1, 3.0, 4.0])
    parser.add_argument("--states", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rows", type=int, default=1024, help="rows of 512 of the synthetic matrix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        synthetic(args.rows)
    else:
        real(args)


if __name__ == "__main__":
    main()
