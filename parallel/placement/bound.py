"""Lower bounds on what any placement of a layer costs, each with the argument that proves it.

The one idea: a bound is worth printing when a reader can check it. Balance is bounded by counting
experts, bytes by relaxing the placement until the best of what is left is computed exactly.

Shapes: E experts, R ranks, N nodes, c = E / R experts of a rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BALANCE_PROOF = "mean load; among the j*R+1 heaviest experts some rank has j+1, and c-1-j others"


def balance_bound(load_E: NDArray[np.int64], ranks: int) -> int:
    """No placement with c experts on each rank leaves less on its busiest rank.

    The mean, rounded up. And, for each j: of the j*R + 1 heaviest experts some rank holds j + 1,
    at the least the lightest j + 1 of these; its other c - 1 - j are at the least the lightest of
    all. (j = 0: the heaviest expert beside the c - 1 lightest.)
    """
    heavy_E = np.sort(load_E)[::-1]
    each = len(load_E) // ranks
    light_sums = np.concatenate([[0], np.cumsum(heavy_E[::-1])])
    best = -(-int(load_E.sum()) // ranks)
    for j in range(each):
        among = heavy_E[j * ranks - j : j * ranks + 1].sum() if j else heavy_E[0]
        best = max(best, int(among + light_sums[each - 1 - j]))
    return best
