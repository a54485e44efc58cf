"""The loops over elements, compiled by numba; all of them release the GIL.

The one idea: one pass over the old values per direction. Loops take four elements at a time,
whatever the dtype, and stop only where something changed. Element types are described by
(shift, sign, kind): class prefix = pattern >> shift; `sign` is the top bit; kind is FLOAT, SIGNED
or UNSIGNED. Indices are unsigned, because numba tests signed ones for being negative.

Entropy blocks are rANS (Duda, arXiv 1311.2540) with a 64-bit state that grows from 1 and moves in
16-bit words, so a block costs no more than its symbols and half a byte.
"""

from __future__ import annotations

import numpy as np
from gossamer.comm.codec.hazard import GUIDE_SHIFT, NODE_BITS, SCALE_BITS, WINDOW
from numba import njit
from numba import uint64 as u64

FLOAT, SIGNED, UNSIGNED = range(3)
STEP_BITS = 12
DIRECT_STEPS = 24
"""Zigzagged steps (less one) below this have a symbol each; the rest one for each power of two."""
NUM_STEP_SYMBOLS = DIRECT_STEPS + 33
LOW = 1 << 47
"""The rANS state is refilled below this."""
MIN_LEAP = 192
"""Elements; a shorter way to the next change is cheaper word by word."""
NODE_MASK = (1 << NODE_BITS) - 1
SCALE = 1 << SCALE_BITS

# what decode_block returns instead of a count
TOO_MANY, BAD_STEP, BAD_END = -1, -2, -3

compiled = njit(cache=True, nogil=True, error_model="numpy")
inlined = njit(cache=True, nogil=True, error_model="numpy", inline="always")


@compiled
def find_changes(old_words, new_words, old, new, found):  # noqa: ANN001, ANN201
    """Writes where flat `old` and `new` differ, and both values there, into `found` (positions,
    before, after); returns how many. `*_words` are the same bytes as uint64 as far as they go;
    arrays of `found` have room for eight more than the elements."""
    positions, before, after = found
    count = u64(0)
    lanes = u64(8 // old.itemsize)
    for word in range(len(old_words)):
        if old_words[word] != new_words[word]:
            first = u64(word) * lanes
            for lane in range(lanes):
                at = first + u64(lane)
                positions[count] = at
                before[count] = old[at]
                after[count] = new[at]
                count += u64(old[at] != new[at])
    for rest in range(u64(len(old_words)) * lanes, len(old)):
        at = u64(rest)
        positions[count] = at
        before[count] = old[at]
        after[count] = new[at]
        count += u64(old[at] != new[at])
    return count


@compiled
def count_prefixes(bits, shift, counts):  # noqa: ANN001, ANN201
    """Adds how many of `bits` have each class prefix."""
    for at in range(len(bits)):
        counts[u64(bits[at] >> shift)] += 1


@inlined
def zigzag_step(old, new, sign, kind):  # noqa: ANN001, ANN201
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


@inlined
def take_step(old, zigzag, sign, kind):  # noqa: ANN001, ANN201
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


@inlined
def step_symbol(zigzag):  # noqa: ANN001, ANN201
    """(symbol, extra bits, their value) of a zigzagged step less one."""
    if zigzag < DIRECT_STEPS:
        return zigzag, 0, np.int64(0)
    rest = zigzag - DIRECT_STEPS + 1
    bits = 0
    while rest >> (bits + 1):
        bits += 1
    return np.int64(DIRECT_STEPS + bits), bits, rest - (np.int64(1) << bits)


@compiled
def count_steps(before, after, shift, sign, kind, class_of, counts):  # noqa: ANN001, ANN201
    """Adds the changes `before` -> `after` to counts [class, step symbol]."""
    for at in range(len(before)):
        symbol, _, _ = step_symbol(zigzag_step(before[at], after[at], sign, kind))
        counts[class_of[u64(before[at] >> shift)], symbol] += 1


@inlined
def cumulative_at(cumulative, length):  # noqa: ANN001, ANN201
    """The distribution function at `length`, times 2**36."""
    node = u64(length >> NODE_BITS)
    below = cumulative[node]
    return below + (((cumulative[node + u64(1)] - below) * (length & NODE_MASK)) >> NODE_BITS)


@compiled
def sum_lengths(old, at, count, lengths, shift):  # noqa: ANN001, ANN201
    """Length of `old` [at, at + count), count a multiple of 4; LLVM makes gathers of this loop."""
    total = np.int64(0)
    first = u64(at)
    for word in range(count >> 2):
        i = first + u64(word) * u64(4)
        total += (lengths[old[i] >> shift] + lengths[old[i + u64(1)] >> shift]) + (
            lengths[old[i + u64(2)] >> shift] + lengths[old[i + u64(3)] >> shift]
        )
    return total


@compiled
def list_symbols(old, lo, hi, positions, after, lengths, class_of, steps, shape, cumulative, out):  # noqa: ANN001, ANN201
    """Symbols of one block, in the order of the decoder: (start, size, bits of the scale) each.

    `old` [lo, hi) is the block, `positions` its changes, `after` their new patterns; `lengths` and
    `class_of` by prefix; `steps` [class, symbol + 1] cumulative out of 4096. Returns their number.
    """
    shift, sign, kind = u64(shape[0]), shape[1], shape[2]
    starts, sizes, scales = out
    count, length, at = 0, np.int64(0), lo
    num_changes = len(positions)
    for change in range(num_changes + 1):
        target = positions[change] if change < num_changes else hi
        ahead = (target - at) & ~3
        if ahead:
            total = sum_lengths(old, at, ahead, lengths, shift)
            if length + total < WINDOW:
                length += total
                at += ahead
        while at + 4 <= target:
            i = u64(at)
            length += (lengths[u64(old[i]) >> shift] + lengths[u64(old[i + u64(1)]) >> shift]) + (
                lengths[u64(old[i + u64(2)]) >> shift] + lengths[u64(old[i + u64(3)]) >> shift]
            )
            at += 4
            if length >= WINDOW:
                starts[count] = cumulative_at(cumulative, length)
                sizes[count] = SCALE - starts[count]
                scales[count] = SCALE_BITS
                count += 1
                length = 0
        before_it = length
        for i in range(at, target):
            before_it += lengths[u64(old[i]) >> shift]
        starts[count] = cumulative_at(cumulative, before_it)
        scales[count] = SCALE_BITS
        if change == num_changes:
            sizes[count] = SCALE - starts[count]
            return count + 1
        prefix = u64(old[target]) >> shift
        behind_it = before_it + lengths[prefix]
        sizes[count] = cumulative_at(cumulative, behind_it) - starts[count]
        length -= behind_it
        symbol, bits, value = step_symbol(zigzag_step(old[target], after[change], sign, kind))
        row = class_of[prefix]
        count += 1
        starts[count] = steps[row, symbol]
        sizes[count] = steps[row, symbol + 1] - steps[row, symbol]
        scales[count] = STEP_BITS
        count += 1
        while bits > 0:
            some = min(bits, 16)
            bits -= some
            starts[count] = (value >> bits) & ((1 << some) - 1)
            sizes[count] = 1
            scales[count] = some
            count += 1
    return count


@compiled
def code_symbols(out, count, data):  # noqa: ANN001, ANN201
    """Writes `count` symbols at the end of `data` (uint8); returns where they begin."""
    starts, sizes, scales = out
    at = len(data)
    state = u64(1)
    for i in range(count - 1, -1, -1):
        size, scale = u64(sizes[i]), u64(scales[i])
        if size == u64(1) << scale:
            continue
        limit = ((u64(LOW) >> scale) << u64(16)) * size
        while state >= limit:
            at -= 2
            data[at] = state & u64(255)
            data[at + 1] = (state >> u64(8)) & u64(255)
            state >>= u64(16)
        whole = state // size
        state = (whole << scale) + (state - whole * size) + u64(starts[i])
    while state > u64(255):
        at -= 2
        data[at] = state & u64(255)
        data[at + 1] = (state >> u64(8)) & u64(255)
        state >>= u64(16)
    if state:
        at -= 1
        data[at] = state
    return at


@inlined
def refilled(state, data, at):  # noqa: ANN001, ANN201
    """The state and the place in `data` after reading as many words as it takes."""
    while state < u64(LOW) and at + 1 < len(data):
        i = u64(at)
        state = (state << u64(16)) | u64(data[i]) | (u64(data[i + u64(1)]) << u64(8))
        at += 2
    return state, at


@inlined
def farthest(state, cumulative, guide):  # noqa: ANN001, ANN201
    """The greatest length that ends at or before the state's place in the distribution."""
    place = np.int64(state & u64(SCALE - 1))
    node = u64(guide[u64(place >> GUIDE_SHIFT)])
    while cumulative[node + u64(1)] <= place:
        node += u64(1)
    below = cumulative[node]
    size = u64(cumulative[node + u64(1)] - below)
    part = ((u64(place - below + 1) << u64(NODE_BITS)) - u64(1)) // size
    return np.int64(node << u64(NODE_BITS)) + np.int64(part)


@inlined
def without(state, start, size):  # noqa: ANN001, ANN201
    """The state before a symbol of the 2**36 scale was coded."""
    place = state & u64(SCALE - 1)
    return u64(size) * (state >> u64(SCALE_BITS)) + place - u64(start)


@inlined
def read_step(state, data, at, steps, row):  # noqa: ANN001, ANN201
    """(zigzagged step less one, state, place in `data`)."""
    place = np.int64(state & u64((1 << STEP_BITS) - 1))
    symbol = 0
    while steps[row, symbol + 1] <= place:
        symbol += 1
    start = steps[row, symbol]
    size = steps[row, symbol + 1] - start
    state = u64(size) * (state >> u64(STEP_BITS)) + u64(place - start)
    state, at = refilled(state, data, at)
    if symbol < DIRECT_STEPS:
        return np.int64(symbol), state, at
    bits = symbol - DIRECT_STEPS
    rest = np.int64(1)
    while bits > 0:
        some = min(bits, 16)
        rest = (rest << some) | np.int64(state & u64((1 << some) - 1))
        state >>= u64(some)
        state, at = refilled(state, data, at)
        bits -= some
    return rest + DIRECT_STEPS - 1, state, at


@compiled
def decode_block(old, lo, hi, data, lengths, class_of, steps, shape, tables, count, found):  # noqa: ANN001, ANN201
    """Decodes `data` on `old` [lo, hi); appends to `found` (positions, patterns) from `count` on.

    Returns the new count, or TOO_MANY, BAD_STEP, BAD_END. Reads and writes inside its arrays
    whatever the data; every turn of a loop moves on in `old` or in the lanes of a word.
    """
    shift, sign, kind = u64(shape[0]), shape[1], shape[2]
    cumulative, guide = tables
    positions, patterns = found
    state, at = u64(0), 0
    if len(data) & 1:
        state, at = u64(data[0]), 1
    state, at = refilled(state, data, at)
    target = farthest(state, cumulative, guide)
    limit = min(target, WINDOW - 1)
    length, word = np.int64(0), lo
    ends = np.empty(5, np.int64)
    sample = min(hi - lo, 256) & ~3
    per_length = (sample + 1.0) / (sum_lengths(old, lo, sample, lengths, shift) + 1.0)
    farthest_leap = hi - lo
    while word < hi:
        while farthest_leap >= MIN_LEAP:
            # most of the way that is left, by what elements took so far; half where that is too far
            ahead = np.int64(0.75 * per_length * (limit - length))
            ahead = min(ahead, farthest_leap, hi - word) & ~31
            if ahead < MIN_LEAP:
                break
            total = sum_lengths(old, word, ahead, lengths, shift)
            if length + total > limit:
                farthest_leap = ahead >> 1
                continue
            length += total
            word += ahead
            per_length += (ahead / (total + 1.0) - per_length) / 4
        farthest_leap = 0
        if word == hi:
            break
        i = u64(word)
        if word + 4 <= hi:
            first = lengths[u64(old[i]) >> shift]
            second = lengths[u64(old[i + u64(1)]) >> shift]
            third = lengths[u64(old[i + u64(2)]) >> shift]
            fourth = lengths[u64(old[i + u64(3)]) >> shift]
        else:
            first = lengths[u64(old[i]) >> shift]
            second = lengths[u64(old[i + u64(1)]) >> shift] if word + 1 < hi else np.int64(0)
            third = lengths[u64(old[i + u64(2)]) >> shift] if word + 2 < hi else np.int64(0)
            fourth = np.int64(0)
        end = length + ((first + second) + (third + fourth))
        if end > limit:
            ends[0] = length
            ends[1] = length + first
            ends[2] = ends[1] + second
            ends[3] = ends[2] + third
            ends[4] = end
            while end > target:
                lane = u64(
                    np.int64(ends[1] <= target)
                    + np.int64(ends[2] <= target)
                    + np.int64(ends[3] <= target)
                )
                begins, behind = ends[lane], ends[lane + u64(1)]
                start = cumulative_at(cumulative, begins)
                state = without(state, start, cumulative_at(cumulative, behind) - start)
                state, at = refilled(state, data, at)
                if count == len(positions):
                    return TOO_MANY
                before = old[i + lane]
                zigzag, state, at = read_step(
                    state, data, at, steps, class_of[u64(before) >> shift]
                )
                if zigzag > 2 * sign - 2:
                    return BAD_STEP
                positions[count] = word + np.int64(lane)
                patterns[count] = take_step(before, zigzag, sign, kind)
                count += 1
                for lane_end in range(5):
                    ends[lane_end] -= behind
                end = ends[4]
                target = farthest(state, cumulative, guide)
            if end >= WINDOW and word + 4 <= hi:
                start = cumulative_at(cumulative, end)
                state = without(state, start, SCALE - start)
                state, at = refilled(state, data, at)
                end = np.int64(0)
                target = farthest(state, cumulative, guide)
            limit = min(target, WINDOW - 1)
            farthest_leap = hi - lo
        length = end
        word += 4
    start = cumulative_at(cumulative, length)
    state = without(state, start, SCALE - start)
    state, at = refilled(state, data, at)
    return count if state == u64(1) and at == len(data) else BAD_END


@compiled
def exchange(live, positions, patterns):  # noqa: ANN001, ANN201
    """Writes `patterns` into `live` at `positions` and leaves there what was in `live`."""
    for at in range(len(positions)):
        i = u64(positions[at])
        before = live[i]
        live[i] = patterns[at]
        patterns[at] = before
