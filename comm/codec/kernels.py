"""The loops over elements, compiled by numba; all of them release the GIL.

The one idea: a pass over a model's weights touches each of them once, in words of 64 bits, and
works only where something changed. Element types are described by (shift, sign, kind): class
prefix = pattern >> shift; `sign` is the top bit; kind is FLOAT, SIGNED or UNSIGNED. Indices are
unsigned, because numba tests signed ones for being negative. The entropy coder's loops are in
coder.py.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba import uint64 as u64

FLOAT, SIGNED, UNSIGNED = range(3)
STEP_BITS = 12
DIRECT_STEPS = 24
"""Zigzagged steps (less one) below this have a symbol each; the rest one for each power of two."""
NUM_STEP_SYMBOLS = DIRECT_STEPS + 33

compiled = njit(cache=True, nogil=True, error_model="numpy")


@compiled
def count_prefixes(bits, shift, counts):
    """Adds how many of `bits` have each class prefix."""
    for at in range(len(bits)):
        counts[u64(bits[at] >> shift)] += 1


@compiled
def zigzag_step(old, new, sign, kind):
    """The step from `old` to `new` in the order of values, zigzagged, less one (int64).

    For floats a step away from zero counts as upwards.
    """
    mask = 2 * sign - 1
    before, after = np.int64(old), np.int64(new)
    negative = kind == FLOAT and before & sign != 0
    if kind == FLOAT:
        before ^= mask if before & sign else sign
        after ^= mask if after & sign else sign
    elif kind == SIGNED:
        before ^= sign
        after ^= sign
    step = (before - after if negative else after - before) & mask
    return (((step << 1) ^ (mask if step & sign else 0)) & mask) - 1


@compiled
def take_step(old, zigzag, sign, kind):
    """The pattern (int64) that `zigzag_step` led to."""
    mask = 2 * sign - 1
    zigzag += 1
    step = (zigzag >> 1) ^ (mask if zigzag & 1 else 0)
    before = np.int64(old)
    if kind == UNSIGNED:
        return (before + step) & mask
    if kind == SIGNED:
        return (((before ^ sign) + step) & mask) ^ sign
    if before & sign:
        after = ((before ^ mask) - step) & mask
    else:
        after = ((before ^ sign) + step) & mask
    return after ^ (sign if after & sign else mask)


@compiled
def step_symbol(zigzag):
    """(symbol, extra bits, their value) of a zigzagged step less one."""
    if zigzag < DIRECT_STEPS:
        return zigzag, 0, np.int64(0)
    rest = zigzag - DIRECT_STEPS + 1
    bits = 0
    while rest >> (bits + 1):
        bits += 1
    return np.int64(DIRECT_STEPS + bits), bits, rest - (np.int64(1) << bits)


@compiled
def class_range(bits, shift, class_of):
    """The lowest and the highest class in `bits`, at least one."""
    first = last = class_of[u64(bits[0] >> shift)]
    for at in range(1, len(bits)):
        row = class_of[u64(bits[at] >> shift)]
        first, last = min(first, row), max(last, row)
    return first, last


@compiled
def count_steps(before, after, shift, sign, kind, class_of, first, counts):
    """Adds the changes `before` -> `after` to counts [class - first, step symbol]."""
    for at in range(len(before)):
        symbol, _, _ = step_symbol(zigzag_step(before[at], after[at], sign, kind))
        counts[class_of[u64(before[at] >> shift)] - first, symbol] += 1


@compiled
def plain_bits(elements, first, steps):
    """(changes, elements, bits) of coding positions at each class's own rate and step symbols at
    one rate for all; `elements` [class], `steps` [class - first, step symbol]."""
    changed, total, bits = np.int64(0), np.int64(0), 0.0
    by_step = np.zeros(steps.shape[1], np.int64)
    for row in range(len(elements)):
        total += elements[row]
    for row in range(len(steps)):
        count = np.int64(0)
        for symbol in range(steps.shape[1]):
            count += steps[row, symbol]
            by_step[symbol] += steps[row, symbol]
        changed += count
        of_class = elements[first + row]
        for some in (count, of_class - count):
            if some > 0:
                bits += some * np.log2(of_class / some)
    for symbol in range(len(by_step)):
        if by_step[symbol] > 0:
            extra = max(0, symbol - DIRECT_STEPS)
            bits += by_step[symbol] * (np.log2(changed / by_step[symbol]) + extra)
    return changed, total, bits


@compiled
def least_bits(elements, first, steps):
    """Bits of these changes at the rates that fit them best, which no model can undercut;
    `elements` [class], `steps` [class - first, step symbol]."""
    bits = 0.0
    for row in range(len(steps)):
        count = np.int64(0)
        for symbol in range(steps.shape[1]):
            count += steps[row, symbol]
        for some in (count, elements[first + row] - count):
            if some > 0:
                bits += some * np.log2(elements[first + row] / some)
        for symbol in range(steps.shape[1]):
            if steps[row, symbol] > 0:
                extra = max(0, symbol - DIRECT_STEPS)
                bits += steps[row, symbol] * (np.log2(count / steps[row, symbol]) + extra)
    return bits


@compiled
def exchange(live, positions, patterns):
    """Writes `patterns` into `live` at `positions` and leaves there what was in `live`."""
    for at in range(len(positions)):
        i = u64(positions[at])
        before = live[i]
        live[i] = patterns[at]
        patterns[at] = before
