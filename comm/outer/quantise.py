"""Two magnitudes for a block: what its kept values become beside their signs.

The one idea: kept values all lie above a threshold, so two levels fit them well; Lloyd's iteration
(each level the mean of what is nearest to it) finds levels that are best in the least squares sense
or nearly. Two bytes hold both: eleven bits are the upper one's exponent and three bits of fraction,
five say how many such steps below it the lower one is. An upper level of 0 says that the block is
empty.
"""

from __future__ import annotations

from gossamer.comm.codec.kernels import compiled
from gossamer.comm.outer.vectors import as_float, as_pattern
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
def level_value(level):
    """The float32 of a level."""
    return as_float(u64(level) << u64(LEVEL_SHIFT))


@compiled
def two_means(values, count):
    """The means of the lower and the upper part of values [0, count), patterns of magnitudes."""
    total = 0.0
    for i in range(count):
        total += as_float(u64(values[i]))
    split = lower = upper = f32(total / count)
    for _ in range(ITERATIONS):
        above, num_above = 0.0, u64(0)
        for i in range(count):
            value = as_float(u64(values[i]))
            is_above = value >= split
            above += value if is_above else f32(0)
            num_above += u64(is_above)
        if num_above == 0 or num_above == count:
            break
        upper = f32(above / num_above)
        lower = f32((total - above) / (count - num_above))
        last, split = split, f32(0.5) * lower + f32(0.5) * upper
        if split == last:
            break
    return lower, upper


@compiled
def two_levels(values, count):
    """(upper level, steps down to the lower one) for values [0, count), patterns of magnitudes."""
    lower, upper = two_means(values, count)
    top = nearest_level(upper)
    if top == 0:
        return top, u64(0)
    bottom = max(nearest_level(lower), u64(1))
    return top, min(top - min(bottom, top), u64(MAX_STEPS))
