"""The loops of sparse.py: rows to bits and back, compiled.

The one idea: one pass over the rows, a block at a time, and everything of a block is done while it
lies in the nearest cache.
"""

from __future__ import annotations

import numpy as np
from gossamer.comm.codec.kernels import compiled
from gossamer.comm.codec.lanes import trailing_zeros
from gossamer.comm.outer.quantise import (
    HEAD_BITS,
    MAX_LEVEL,
    MAX_STEPS,
    STEP_BITS,
    level_pattern,
    two_levels,
)
from gossamer.comm.outer.topk import pad, select, threshold_guess
from gossamer.comm.outer.vectors import LANES, as_float, as_pattern, take_magnitudes
from numba import float32 as f32
from numba import uint64 as u64

INFINITY = 0x7F800000
SIGN = 1 << 31
SIZE = 4096

# what read_run returns instead of 0
BAD_LEVELS, BAD_GAP, BAD_COUNT, BAD_END = -1, -2, -3, -4
FAULTS = {
    BAD_LEVELS: "levels that are not finite or not above 0",
    BAD_GAP: "a position leaves its block",
    BAD_COUNT: "another number of values than promised",
    BAD_END: "bits that end too early or too late",
}


@compiled
def block_begin(index, pieces, piece, stride):
    """Flat index of a block's first element."""
    if pieces == u64(1):
        return index * piece
    a_band = stride // piece
    band = index // a_band
    return band * pieces * stride + (index - band * a_band) * piece


@compiled
def kept_of(size, k):
    """How many of a block of `size` elements are kept where k of 4096 are."""
    return max(u64(1), (u64(k) * size + u64(SIZE // 2)) // u64(SIZE))


@compiled
def load_block(bits, begin, size, pieces, stride, block):
    """Copies the magnitudes of a block, zeros behind them up to whole vectors; returns (padded
    size, the greatest, their sum)."""
    if pieces > u64(1):
        greatest, total = take_magnitudes(bits, begin, stride, block, pieces)
        return size, greatest, total
    whole = size // u64(LANES)
    greatest, total = take_magnitudes(bits, begin, u64(LANES), block, whole)
    for i in range(whole * u64(LANES), size):
        block[i] = bits[begin + i] & u64(SIGN - 1)
        greatest = max(greatest, u64(block[i]))
        total += as_float(u64(block[i]))
    return pad(block, size), greatest, total


@compiled
def put(words, filled, value, num_bits):
    """Writes the low `num_bits` (at most 56) of `value` at bit `filled`; above it words are 0."""
    at, shift = filled >> u64(6), filled & u64(63)
    words[at] |= value << shift
    words[at + u64(1)] = (value >> u64(1)) >> (u64(63) - shift)
    return filled + u64(num_bits)


@compiled
def put_gap(words, filled, gap, rice, tail, num_tail):
    """Writes a gap and `num_tail` bits behind it."""
    zeros = gap >> rice
    while zeros > u64(32):
        filled = put(words, filled, u64(0), u64(32))
        zeros -= u64(32)
    rest = (gap & ((u64(1) << rice) - u64(1))) | (tail << rice)
    value = (u64(1) | (rest << u64(1))) << zeros
    return put(words, filled, value, zeros + u64(1) + rice + num_tail)


@compiled
def code_run(bits, k, rice, num_blocks, pieces, piece, stride, positions, patterns, words):
    """Keeps and codes all blocks of `bits`; returns (how many were kept, bits of the code), or (-1,
    index) of an element that is not finite."""
    pieces, piece, stride, rice = u64(pieces), u64(piece), u64(stride), u64(rice)
    shift, mask = trailing_zeros(piece), piece - u64(1)
    block = np.empty(SIZE, np.uint32)
    found = np.empty(SIZE + LANES, np.uint32)
    places = np.empty(SIZE + LANES, np.uint32)
    kept, filled, ratio = u64(0), u64(0), f32(2.5)
    words[u64(0)] = 0
    for index in range(u64(0), u64(num_blocks)):
        begin = block_begin(index, pieces, piece, stride)
        size = u64(SIZE) if pieces > u64(1) else min(u64(SIZE), u64(len(bits)) - begin)
        padded, greatest, total = load_block(bits, begin, size, pieces, stride, block)
        if greatest >= u64(INFINITY):
            return np.int64(-1), first_not_finite(bits)
        top, steps, count = u64(0), u64(0), u64(0)
        if greatest > u64(0):
            guess = threshold_guess(total, size, ratio)
            count, least = select(block, padded, kept_of(size, k), greatest, guess, found, places)
            ratio = f32(0.9) * as_float(least) * f32(size) / total
            top, steps = two_levels(found, (count + u64(LANES - 1)) & ~u64(LANES - 1))
        filled = put(words, filled, steps | (top << u64(STEP_BITS)), HEAD_BITS)
        if top == u64(0):
            continue
        upper, lower = level_pattern(top), level_pattern(top - steps)
        middle = as_pattern(f32(0.5) * as_float(lower) + f32(0.5) * as_float(upper))
        gap_from = u64(0)
        for i in range(count):
            place = u64(places[i])
            at = begin + (place >> shift) * stride + (place & mask)
            # levels and signs are anyone's guess: no branch
            is_upper = u64(u64(found[i]) >= middle)
            sign = u64(bits[at]) >> u64(31)
            tail = is_upper | (sign << u64(1))
            filled = put_gap(words, filled, place - gap_from, rice, tail, u64(2))
            gap_from = place + u64(1)
            positions[kept] = at
            patterns[kept] = (lower + is_upper * (upper - lower)) | (sign << u64(31))
            kept += u64(1)
        if count < kept_of(size, k):
            filled = put_gap(words, filled, size - gap_from, rice, u64(0), u64(0))
    return np.int64(kept), np.int64(filled)


@compiled
def first_not_finite(bits):
    """Index of the first infinity or NaN."""
    for i in range(len(bits)):
        if bits[u64(i)] & u64(SIGN - 1) >= INFINITY:
            return np.int64(i)
    return np.int64(-1)


@compiled
def peek(words, at):
    """The 64 bits from bit `at` on."""
    word, shift = at >> u64(6), at & u64(63)
    return (words[word] >> shift) | ((words[word + u64(1)] << u64(1)) << (u64(63) - shift))


@compiled
def read_gap(words, at, stop, rice, size):
    """(a gap, the bit behind it); beyond `stop` where the bits end before it does, and a gap above
    `size` where more zeros come than a block has room for."""
    zeros, word = u64(0), peek(words, at)
    while word == u64(0):
        zeros += u64(64)
        at += u64(64)
        if at >= stop or zeros << rice > size:
            return size + u64(1), at
        word = peek(words, at)
    low = trailing_zeros(word)
    at += low + u64(1)
    if at + rice > stop:
        return size + u64(1), stop + u64(1)
    rest = peek(words, at) & ((u64(1) << rice) - u64(1))
    return ((zeros + low) << rice) | rest, at + rice


@compiled
def read_run(
    words, num_bits, elements, k, rice, num_blocks, pieces, piece, stride, positions, patterns
):
    """Fills `positions` and `patterns` (of fp32) from the bits; returns 0, or why it cannot be.

    `words` are at least 130 bits longer than the bits, all 0.
    """
    pieces, piece, stride, rice = u64(pieces), u64(piece), u64(stride), u64(rice)
    shift, mask = trailing_zeros(piece), piece - u64(1)
    at, kept, stop, room = u64(0), u64(0), u64(num_bits), u64(len(positions))
    for index in range(u64(0), u64(num_blocks)):
        if at + u64(HEAD_BITS) > stop:
            return BAD_END
        head = peek(words, at) & u64((1 << HEAD_BITS) - 1)
        at += u64(HEAD_BITS)
        top, steps = head >> u64(STEP_BITS), head & u64(MAX_STEPS)
        if head == u64(0):
            continue
        if top > u64(MAX_LEVEL) or steps >= top:
            return BAD_LEVELS
        upper, lower = level_pattern(top), level_pattern(top - steps)
        begin = block_begin(index, pieces, piece, stride)
        size = min(u64(SIZE), u64(elements) - begin) if pieces == u64(1) else u64(SIZE)
        place, first, most = u64(0), kept, kept + kept_of(size, k)
        while kept < most:
            gap, at = read_gap(words, at, stop, rice, size)
            place += gap
            if at > stop:
                return BAD_END
            if place >= size:
                break
            if kept == room:
                return BAD_COUNT
            tail = peek(words, at)
            at += u64(2)
            positions[kept] = begin + (place >> shift) * stride + (place & mask)
            pattern = lower + (tail & u64(1)) * (upper - lower)
            patterns[kept] = pattern | ((tail & u64(2)) << u64(30))
            kept += u64(1)
            place += u64(1)
        if place > size or kept == first:
            return BAD_GAP
    if at > stop or at + u64(8) <= stop or peek(words, at) != u64(0):
        return BAD_END
    return 0 if kept == room else BAD_COUNT
