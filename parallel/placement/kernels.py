"""The solvers' inner loops, compiled by numba.

The one idea: a swap of two experts keeps every rank's number of experts, so a search by swaps never
leaves the placements that training can use. Loads are integers: no sum drifts.

Shapes: E experts, R ranks, N nodes, K slots, U distinct token sets.
"""

from __future__ import annotations

import numpy as np
from numba import njit

compiled = njit(cache=True, nogil=True, error_model="numpy")


@compiled
def pack_heaviest_first(load_E, order_E, ranks):
    """LPT with c experts a rank: each, in the given order, to the lightest rank with room."""
    experts = len(load_E)
    each = experts // ranks
    rank_E = np.empty(experts, np.int64)
    load_R, count_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for e in order_E:
        best = -1
        for r in range(ranks):
            if count_R[r] < each and (best < 0 or load_R[r] < load_R[best]):
                best = r
        rank_E[e] = best
        load_R[best] += load_E[e]
        count_R[best] += 1
    return rank_E


@compiled
def swap_down(load_E, rank_E, ranks, target):
    """Swaps an expert of the busiest rank for one of another, as long as that lowers the higher of
    the two and no swap does so more; in place. Ends at `target`. Returns the busiest load."""
    experts = len(load_E)
    each = experts // ranks
    load_R = np.zeros(ranks, np.int64)
    held_RC = np.empty((ranks, each), np.int64)
    count_R = np.zeros(ranks, np.int64)
    for e in range(experts):
        r = rank_E[e]
        held_RC[r, count_R[r]] = e
        count_R[r] += 1
        load_R[r] += load_E[e]
    while True:
        top = load_R.argmax()
        if load_R[top] <= target:
            break
        best, best_i, best_r, best_j = load_R[top], -1, -1, -1
        for r in range(ranks):
            if r == top:
                continue
            for i in range(each):
                for j in range(each):
                    shift = load_E[held_RC[top, i]] - load_E[held_RC[r, j]]
                    if shift <= 0:
                        continue
                    higher = max(load_R[top] - shift, load_R[r] + shift)
                    if higher < best:
                        best, best_i, best_r, best_j = higher, i, r, j
        if best_i < 0:
            break
        a, b = held_RC[top, best_i], held_RC[best_r, best_j]
        held_RC[top, best_i], held_RC[best_r, best_j] = b, a
        rank_E[a], rank_E[b] = best_r, top
        shift = load_E[a] - load_E[b]
        load_R[top] -= shift
        load_R[best_r] += shift
    return load_R.max()
