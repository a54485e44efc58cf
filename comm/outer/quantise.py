"""Two magnitudes for a block: what its kept values become beside their signs.

The one idea: kept values all lie above a threshold, so two levels fit them well; Lloyd's iteration
(each level the mean of what is nearest to it) finds levels that are best in the least squares sense
or nearly. Two bytes hold both: eleven bits are the upper one's exponent and three bits of fraction,
five say how many such steps below it the lower one is. An upper level of 0 says that the block is
empty.
"""

from __future__ import annotations

from gossamer.comm.codec.kernels import compiled
from gossamer.comm.outer.vectors import as_pattern, sum_from
from numba import float32 as f32
from numba import uint64 as u64

LEVEL_SHIFT = 20
"""From a float's pattern to its level."""
MAX_LEVEL = 0x7F7
"""The greatest that is finite."""
STEP_BITS = 5
MAX_STEPS = (1 << STEP_BITS) - 1
HEAD_BITS = 16
ITERATIONS = 8


@compiled
def nearest_level(value):
    """The level nearest to a magnitude."""
    level = (as_pattern(value) + u64(1 << (LEVEL_SHIFT - 1))) >> u64(LEVEL_SHIFT)
    return min(level, u64(MAX_LEVEL))


@compiled
def level_pattern(level):
    """The pattern of a level's float32."""
    return u64(level) << u64(LEVEL_SHIFT)


@compiled
def two_means(values, padded):
    """The means of the lower and the upper part of values [0, padded), patterns of magnitudes
    and zeros, which do not count."""
    count, total = sum_from(values, padded, u64(1))
    split = lower = upper = f32(total / f32(count))
    for _ in range(ITERATIONS):
        num_above, above = sum_from(values, padded, as_pattern(split))
        if num_above == 0 or num_above == count:
            break
        upper = f32(above / f32(num_above))
        lower = f32((total - above) / f32(count - num_above))
        last, split = split, f32(0.5) * lower + f32(0.5) * upper
        if split == last:
            break
    return lower, upper


@compiled
def two_levels(values, padded):
    """(upper level, steps down to the lower one) for values [0, padded), as in `two_means`."""
    lower, upper = two_means(values, padded)
    top = nearest_level(upper)
    if top == 0:
        return top, u64(0)
    bottom = max(nearest_level(lower), u64(1))
    return top, min(top - min(bottom, top), u64(MAX_STEPS))
