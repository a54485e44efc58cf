"""The fewest bytes that a delta can take when each class changes at its own rate.

The one idea: given the exponents of the old values, positions cost n H(k / n) bits in each class
and steps their entropy in it; whatever tells a decoder those rates comes on top and is left out.
"""

from __future__ import annotations

import numpy as np
from gossamer.comm.codec.bits import find_positions, steps_between
from gossamer.comm.codec.elements import class_of_prefix, element_shape


def bound_bytes(old: np.ndarray, new: np.ndarray, dtype: str) -> float:
    """Sum over classes of (n H(k / n) + k H(step | class)) / 8, for one tensor's flat patterns."""
    shift = element_shape(dtype)[0]
    positions = find_positions(old, new)
    classes = class_of_prefix(dtype)
    elements = np.bincount(classes[old >> shift])
    changed = classes[old[positions] >> shift]
    steps = steps_between(old[positions], new[positions])
    bits = 0.0
    for each in np.unique(changed):
        counts = np.unique(steps[changed == each], return_counts=True)[1]
        n, k = int(elements[each]), int(counts.sum())
        bits += (counts * np.log2(k / counts)).sum() + k * np.log2(n / k)
        bits += (n - k) * np.log2(n / (n - k)) if k < n else 0.0
    return float(bits) / 8
