"""Where the next change is, as one symbol: elements laid end to end on a line of hazard.

The one idea: an element of a class that changes with probability p takes the length -log2(1 - p) on
a line, and the distance to the next change is then exponential whatever the classes: one fixed
distribution codes positions of every density, and an arithmetic coder's symbol for a change is the
piece of the distribution that the element covers. Everything is integers, the same on all machines.

Lengths are counted in units of 2**-24 octave, and a class's length is one of LENGTHS, so that one
byte names it. CUMULATIVE holds 2**36 times the distribution function at every 1/64 octave; between
two nodes it is a straight line (a last entry closes it at 2**36). A share of 2**-9 is spread evenly
over the line, so that even the shortest element far out has a piece of its own.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

OCTAVE_BITS = 24
NODE_BITS = 18
NUM_NODES = 2048
SCALE_BITS = 36
GUIDE_SHIFT = 24
# a word that ends at this length or more without a change is left by a symbol of its own
WINDOW = 6 << OCTAVE_BITS
# 0 for a class that never changes, then an eighth of an octave apart up to WINDOW
LENGTHS = np.array([0, *((8 + m % 8) << (m // 8) for m in range(189))], np.int64)


def _node_table() -> np.ndarray:
    even = 1 << (SCALE_BITS - 9)
    whole = (1 << SCALE_BITS) - even
    nodes = []
    for node in range(NUM_NODES + 1):
        octave, sixty_fourths = divmod(node, 64)
        root = 1 << (64 * 64 - sixty_fourths)  # 2**(64 * 64 - s): its 64th root is 2**(64 - s / 64)
        for _ in range(6):
            root = isqrt(root)
        nodes.append(whole - (whole * root >> (64 + octave)) + node * even // NUM_NODES)
    return np.array([*nodes, 1 << SCALE_BITS], np.int64)


CUMULATIVE = _node_table()
_STARTS = np.arange(1 << (SCALE_BITS - GUIDE_SHIFT), dtype=np.int64) << GUIDE_SHIFT
# the node at or before each 2**24 of the distribution: where a search for a node begins
GUIDE = (np.searchsorted(CUMULATIVE, _STARTS, "right") - 1).astype(np.int32)


def length_codes(num_changed: np.ndarray, num_elements: np.ndarray) -> np.ndarray:
    """Index in LENGTHS of the length nearest to that of `num_changed` in `num_elements`, each."""
    p = np.minimum(num_changed / np.maximum(num_elements, 1), 1 - 2.0**-6)
    units = np.clip(-np.log2(1 - p) * 2.0**OCTAVE_BITS, LENGTHS[1], LENGTHS[-1])
    above = np.maximum(np.searchsorted(LENGTHS, units), 2)
    nearest = above - (units * units < LENGTHS[above - 1] * LENGTHS[above])
    return np.where(num_changed > 0, nearest, 0)
