"""Balance in a millisecond: heaviest first, then swaps, then swaps from shaken starts.

The one idea: with many experts a rank, pairs that swap reach the mean to a few parts in ten
thousand; the bound of bound.py then proves it. Each layer stands alone.

Shapes: L layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
from gossamer.parallel.placement.bound import balance_bound
from gossamer.parallel.placement.kernels import pack_heaviest_first, swap_down
from numpy.typing import NDArray

SHAKES, SHAKEN_SHARE = 1000, 0.15
"""Restarts at most, and the share of experts that change places before each."""


def lpt(load_E: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """The rank of each expert: heaviest first to the lightest rank with room."""
    order_E = np.argsort(-load_E, kind="stable")
    return pack_heaviest_first(np.ascontiguousarray(load_E), order_E, ranks)


def balanced(
    load_E: NDArray[np.int64],
    ranks: int,
    gap: float = 0.0,
    until_s: float = 0.0,
    starts: Sequence[NDArray[np.int64]] = (),
) -> NDArray[np.int64]:
    """The rank of each expert: LPT (or one of `starts`, if that ends better) and swaps.

    While the busiest rank is more than `gap` above the bound and perf_counter() is below
    `until_s`, a few experts change places at random and swaps begin again; the best is kept.
    """
    load_E = np.ascontiguousarray(load_E, dtype=np.int64)
    target = balance_bound(load_E, ranks)
    best_E = lpt(load_E, ranks)
    best = swap_down(load_E, best_E, ranks, target)
    for start_E in starts:
        other_E = np.array(start_E, dtype=np.int64)
        other = swap_down(load_E, other_E, ranks, target)
        if other < best:
            best, best_E = other, other_E
    random = np.random.default_rng(0)
    shaken = max(2, round(SHAKEN_SHARE * len(load_E)))
    for _ in range(SHAKES):
        if best <= target * (1 + gap) or perf_counter() > until_s:
            break
        rank_E = best_E.copy()
        chosen = random.permutation(len(load_E))[:shaken]
        rank_E[chosen] = rank_E[random.permutation(chosen)]
        found = swap_down(load_E, rank_E, ranks, target)
        if found < best:
            best, best_E = found, rank_E
    return best_E
