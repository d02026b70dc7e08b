"""The numbers of a row as a path of the trellis (codecs/trellis.py): Viterbi's search, errors cancelled on the way.

With u_i the wish for column i in steps, which depends on the errors e of the columns before (solve/water.py), the path with
the least sum of (u_i - m_i)^2 + rate bits(m_i) is sought. Of all paths into a state the cheapest survives, with its own
errors; a state tries two numbers of either parity, those around the wish. bits(m) is that of a normal whose cells end between
the quantiser's points, in classes of its deviation: sigma = 2^((class - UNIT) / OCTAVE) steps, the class the sum of a row's
and a column's.

Survivors are the branches of a tree: they have the same trunk, and part a hundred columns ago or so. (Of a row that is all
under water they hardly ever meet again, and its search takes longer the longer it is.) Columns are taken STRETCH at a time.
Within a stretch a survivor keeps a row of STRETCH numbers: the errors of the columns that are done, and for the others what
all errors so far take from their wishes. At its end the rows are put away, each with the place of the row that its path had
a stretch before; rows that no survivor comes from are dropped, and a stretch that has one row left is decided: it is the
trunk's. So nothing is decided before its time, and only what survivors differ in costs as much as there are states.

The loops over states are written for the vectorizer: flat arrays, one store to each, no table in the loop that computes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.stats import norm

from ..codecs.lattice import CLASSES, OCTAVE, UNIT
from ..codecs.rans import LARGEST
from ..codecs.trellis import NEXT_S2, QUANTISERS, STATES
from ..errors import SupremumError

Floats = NDArray[np.float32]
Integers = NDArray[np.int16]
STRETCH = 16  # columns: one vector of numbers
ESCAPED = 44.0  # bits of a number without a symbol: the escape and the integer in full
FAR = 1e30
PLACES = LARGEST + 4  # of costs by k: from -1, which is no number, to one without a symbol and an odd one, which may not be
SIZE, LOW, HIGH, SEEN = STATES, 2 * STATES, 4 * STATES, 6 * STATES  # places in `seen`, and its length
NUMBER, ERROR, WAYS = 2 * STATES, 4 * STATES, 6 * STATES  # in `ways`, each for even and odd numbers
FAST: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def search(work_BI: Floats, shares_BB: Floats, upper_II: Floats, lower_II: Floats, step_B: Floats, step_I: Floats,
           class_B: Integers, class_I: Integers, rate: float, integers_BI: Integers, error_BI: Floats) -> float:
    """Find the paths of a block of rows, one after the other; the bits of all, by the normal's cost.

    shares_BB: V_op / V_oo, by which row o's errors are handed on to row p, or (0, 0). upper_II: U of the metric, with zeros
    below its diagonal; lower_II: its transpose; both contiguous. rate > 0. Fills the integers m and what they leave of the
    wishes, r_o. Raises SupremumError for what is not finite."""
    if not all(np.isfinite(part).all() and (part > 0).all() for part in (step_B, step_I)) or not np.isfinite(work_BI).all():
        raise SupremumError("a matrix or its statistics hold numbers that are not finite.", "Check the model's weights.")
    return float(_search(work_BI, shares_BB, upper_II, lower_II, step_B, step_I, class_B, class_I, _costs(rate), _before(),
                         integers_BI, error_BI)) / rate


@cache
def normal_bits() -> NDArray[np.float32]:
    """(CLASSES, QUANTISERS, LARGEST + 1) bits of k by its size, its sign included."""
    sigma_K1 = 2.0 ** ((np.arange(CLASSES) - UNIT) / OCTAVE)[:, None]
    size = np.arange(LARGEST + 2)
    bits = np.empty((CLASSES, QUANTISERS, LARGEST + 1), np.float32)
    for quantiser in range(QUANTISERS):
        point = 2 * size - quantiser * (size > 0)
        above = (point[:-1] + point[1:]) / 2
        mass = norm.sf(np.append(-above[0], above[:-1]) / sigma_K1) - norm.sf(above / sigma_K1)
        bits[:, quantiser] = -np.log2(np.maximum(mass, 2.0**-24))
    return bits


def _costs(rate: float) -> Floats:
    """(CLASSES, QUANTISERS PLACES) rate times bits of k, at 1 + k; what has no symbol counts as even."""
    cost_KQM = np.empty((CLASSES, QUANTISERS, PLACES), np.float32)
    cost_KQM[..., 1:-2] = rate * normal_bits()
    cost_KQM[..., [0, -2, -1]] = FAR, rate * ESCAPED, FAR
    return cost_KQM.reshape(CLASSES, -1)


@cache
def _before() -> NDArray[np.uint32]:
    """(2 STATES,): the two ways into each state, as parity STATES + state."""
    return np.array([[parity * STATES + state for state in range(STATES) for parity in range(2)
                      if NEXT_S2[state, parity] == to] for to in range(STATES)], np.uint32).T.ravel()


@njit(**FAST)
def _choose(seen, cost_S, cost_N, scale, place_N, ways):
    """What each state would take of either parity: `ways`, the cost with the path's before, the number and its error.

    `seen` holds each state's wish in steps, and takes its size and what the bits of four numbers cost. Wishes are held to
    32000 steps: only feedback can ask for more."""
    for s in range(STATES):
        quantiser = np.float32(s & 1)
        size = min(abs(seen[s]), np.float32(32000))
        below = np.float32(np.int32((size + quantiser) * np.float32(0.5)))  # the last whose point is not above the wish
        even = np.float32(2) * np.float32(np.int32(below * np.float32(0.5)))
        odd = np.float32(2) * np.float32(np.int32((below + np.float32(1)) * np.float32(0.5))) - np.float32(1)
        nearest = np.float32(np.int32((size + np.float32(1) + quantiser) * np.float32(0.5)))
        even = nearest if below > np.float32(LARGEST) else even  # without a symbol every number is even
        seen[SIZE + s] = size
        ways[NUMBER + s], ways[NUMBER + STATES + s] = even, odd
        first, last = np.float32(1) + quantiser * np.float32(PLACES), np.float32(LARGEST + 1)
        place_N[s] = np.int32(first + min(even, last))
        place_N[STATES + s] = np.int32(first + min(odd, last + np.float32(1)))
        place_N[2 * STATES + s] = np.int32(first + min(even + np.float32(2), last))
        place_N[3 * STATES + s] = np.int32(first + min(odd + np.float32(2), last + np.float32(1)))
    for n in range(4 * STATES):
        seen[LOW + n] = cost_N[place_N[n]]
    for parity in range(2):
        for s in range(STATES):
            n = parity * STATES + s
            k, size, quantiser = ways[NUMBER + n], seen[SIZE + s], np.float32(s & 1)
            low = size - max(np.float32(2) * k - quantiser, np.float32(0))
            high = size - (np.float32(2) * k + np.float32(4) - quantiser)
            cost_low, cost_high = low * low + seen[LOW + n], high * high + seen[HIGH + n]
            up = cost_high < cost_low
            sign = np.float32(1) if seen[s] >= np.float32(0) else np.float32(-1)
            ways[n] = cost_S[s] + (cost_high if up else cost_low)
            ways[NUMBER + n] = sign * (k + np.float32(2) if up else k)
            ways[ERROR + n] = sign * scale * (high if up else low)


@njit(**FAST)
def _merge(ways, before_N, root_S, cost_S, k_S, error_S, came_S, new_root_S):
    """Of the two ways into each state the cheaper."""
    for to in range(STATES):
        one, two = before_N[to], before_N[STATES + to]
        n = two if ways[two] < ways[one] else one
        s = n & np.uint32(STATES - 1)
        cost_S[to], k_S[to], error_S[to] = ways[n], np.int16(ways[NUMBER + n]), ways[ERROR + n]
        came_S[to], new_root_S[to] = s, root_S[s]


@njit(**FAST)
def _follow(row_ST, came_S, error_S, passed_T, j, width, new_ST):
    """Survivors' rows after column j of the stretch; passed_T: U of this column and those of the stretch, 0 before it."""
    for to in range(STATES):
        s, error = came_S[to], error_S[to]
        for t in range(width):
            new_ST[to, t] = row_ST[s, t] + error * passed_T[t]
        new_ST[to, j] = error


@njit(**FAST)
def _search(work_BI, shares_BB, upper_II, lower_II, step_B, step_I, class_B, class_I, cost_KN, before_N, integers_BI,
            error_BI):
    assert len(before_N) == 2 * STATES  # the compiler's cache does not see that trellis.py has changed
    rows, columns = work_BI.shape
    stretches = (columns + STRETCH - 1) // STRETCH
    wish_I, trunk_I = np.empty(columns, np.float32), np.empty(columns, np.float32)
    seen, ways, error_S = np.empty(SEEN, np.float32), np.empty(WAYS, np.float32), np.empty(STATES, np.float32)
    place_N = np.empty(4 * STATES, np.uint32)
    cost_S, new_cost_S = np.empty(STATES, np.float32), np.empty(STATES, np.float32)
    came_IS, k_IS = np.empty((columns, STATES), np.uint8), np.empty((columns, STATES), np.int16)
    row_ST, new_ST = np.empty((STATES, STRETCH), np.float32), np.empty((STATES, STRETCH), np.float32)
    some_ST, product_ST = np.empty((STATES, STRETCH), np.float32), np.empty((STATES, STRETCH), np.float32)
    block_TT = np.zeros((STRETCH, STRETCH), np.float32)
    root_S, new_root_S = np.empty(STATES, np.int64), np.empty(STATES, np.int64)  # whose row it had a stretch ago
    kept_CST, root_CS = np.empty((stretches, STATES, STRETCH), np.float32), np.empty((stretches, STATES), np.int64)
    alive_CS, alive_C = np.empty((stretches, STATES), np.int64), np.empty(stretches, np.int64)
    spent = 0.0
    for o in range(rows):
        wish_I[:] = work_BI[o]
        if len(shares_BB):
            for p in range(o):
                share, other_I = shares_BB[p, o], error_BI[p]
                for i in range(columns):
                    wish_I[i] -= share * other_I[i]
        cost_S[:] = np.float32(FAR)
        cost_S[0] = 0
        decided = 0  # stretches
        for c in range(stretches):
            begin, old = c * STRETCH, decided * STRETCH
            width = min(STRETCH, columns - begin)
            row_ST[:] = 0
            for j in range(width):
                early_T, taken = lower_II[begin + j, :old], np.float32(0)
                for t in range(old):
                    taken += trunk_I[t] * early_T[t]
                row_ST[:, j] = taken
            for d in range(decided, c):  # what survivors differ in
                block_TT[:, :width] = upper_II[d * STRETCH:(d + 1) * STRETCH, begin:begin + width]
                count = alive_C[d]
                for n in range(count):
                    some_ST[n] = kept_CST[d, alive_CS[d, n]]
                np.dot(some_ST[:count], block_TT, product_ST[:count])
                for n in range(count):
                    s = alive_CS[d, n]
                    before_T, own_T, new_T = row_ST[root_CS[d, s]], product_ST[n], new_ST[s]
                    for j in range(width):
                        new_T[j] = before_T[j] + own_T[j]
                row_ST, new_ST = new_ST, row_ST
            root_S[:] = np.arange(STATES)
            for j in range(width):
                i = begin + j
                step = step_B[o] * step_I[i]
                own_class = min(max(class_B[o] + class_I[i], 0), CLASSES - 1)
                for s in range(STATES):
                    seen[s] = (wish_I[i] - row_ST[s, j]) / step
                _choose(seen, cost_S, cost_KN[own_class], step / upper_II[i, i], place_N, ways)
                _merge(ways, before_N, root_S, new_cost_S, k_IS[i], error_S, came_IS[i], new_root_S)
                _follow(row_ST, came_IS[i], error_S, upper_II[i, begin:begin + width], j, width, new_ST)
                row_ST, new_ST = new_ST, row_ST
                cost_S, new_cost_S = new_cost_S, cost_S
                root_S, new_root_S = new_root_S, root_S
            cost_S -= cost_S.min()
            kept_CST[c], root_CS[c], alive_CS[c], alive_C[c] = row_ST, root_S, np.arange(STATES), STATES
            for d in range(c - 1, decided - 1, -1):
                came_from = np.zeros(STATES, np.bool_)
                for n in range(alive_C[d + 1]):
                    came_from[root_CS[d + 1, alive_CS[d + 1, n]]] = True
                alive_C[d] = 0
                for s in range(STATES):
                    if came_from[s]:
                        alive_CS[d, alive_C[d]] = s
                        alive_C[d] += 1
            while decided < c and alive_C[decided] == 1:
                trunk_I[decided * STRETCH:(decided + 1) * STRETCH] = kept_CST[decided, alive_CS[decided, 0]]
                decided += 1
        state = np.int64(np.argmin(cost_S))
        for i in range(columns - 1, -1, -1):
            k = np.int64(k_IS[i, state])
            state = np.int64(came_IS[i, state])
            quantiser = state & 1
            integers_BI[o, i] = 2 * k - quantiser * ((k > 0) - (k < 0))
            error_BI[o, i] = wish_I[i] - np.float32(integers_BI[o, i]) * (step_B[o] * step_I[i])
            own_class = min(max(class_B[o] + class_I[i], 0), CLASSES - 1)
            spent += cost_KN[own_class, quantiser * PLACES + 1 + min(abs(k), LARGEST + 1)]
    return spent
