"""The k greatest magnitudes of a block, exactly: of equal ones, those that come first.

The one idea: the block lies in the nearest cache, so a guess at the threshold is tried in a tenth
of a microsecond. A guess from the block's mean leaves a little more than k candidates, and the
k-th greatest of those few is found by bisection of their patterns.
"""

from __future__ import annotations

from gossamer.comm.codec.kernels import compiled
from gossamer.comm.outer.vectors import LANES, as_pattern, list_from, sum_from
from numba import float32 as f32
from numba import uint64 as u64

# the first steps from a guess that was wrong: patterns a quarter octave apart
QUARTER_OCTAVE = 1 << 21


@compiled
def near_threshold(block, count, k, greatest, guess):
    """A pattern that k or a little more of block [0, count) reach, `guess` if it is one; 1 where
    fewer than k are not zero. `greatest` is the greatest of the block."""
    low, high, step = u64(1), u64(greatest) + u64(1), u64(QUARTER_OCTAVE)
    most = u64(2) * u64(k) + u64(32)
    down = up = False
    guess = min(max(u64(guess), low), u64(greatest))
    while low < high:
        reached, _ = sum_from(block, count, guess)
        if reached < k:
            high, down = guess, True
        elif reached > most:
            low, up = guess, True
        else:
            return guess
        if high - low <= u64(1):
            break
        if down and up:
            guess = (low + high) >> u64(1)
        elif down:
            guess = max(high - min(step, high), low)
        else:
            guess = min(low + step, high - u64(1))
        step <<= u64(1)
    return low


@compiled
def select(block, count, k, greatest, guess, values, places):
    """Writes the k greatest of block [0, count) (fewer where fewer are not zero) and their places,
    ascending; returns (how many, the least of them).

    `values` and `places` have room for `count` + LANES; zeros follow up to a whole vector.
    """
    least = near_threshold(block, count, k, greatest, guess)
    found = list_from(block, count, least, values, places)
    padded = pad(values, found)
    if found <= k:
        return found, least
    low, high = least, u64(greatest) + u64(1)
    while high - low > u64(1):
        middle = (low + high) >> u64(1)
        reached, _ = sum_from(values, padded, middle)
        if reached >= k:
            low = middle
        else:
            high = middle
    above, _ = sum_from(values, padded, high)
    ties = u64(k) - above
    kept = u64(0)
    for i in range(found):
        # whether it stays is anyone's guess: no branch
        value, is_tie = values[i], u64(values[i] == low)
        values[kept], places[kept] = value, places[i]
        kept += u64(value > low) | (is_tie & u64(ties > 0))
        ties -= is_tie & u64(ties > 0)
    pad(values, kept)
    return kept, low


@compiled
def pad(values, count):
    """Writes zeros behind values [0, count) up to whole vectors; returns where these end."""
    padded = (u64(count) + u64(LANES - 1)) & ~u64(LANES - 1)
    for i in range(u64(count), padded):
        values[i] = 0
    return padded


@compiled
def threshold_guess(total, count, ratio):
    """The pattern of `ratio` times the mean magnitude."""
    return as_pattern(f32(total / f32(count) * f32(ratio)))
