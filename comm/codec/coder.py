"""The loops of the entropy coder: old values and changes to bytes, and back.

The one idea: one pass over the old values per direction that stops only at changes. The way from
one to the next is added up in strides of vectors (lanes.py), which keeps the scan near the speed of
memory; the format's words of four elements are looked at only where a change or a window ends.

Blocks are rANS (Duda, arXiv 1311.2540) with a 64-bit state that grows from 1 and moves in 16-bit
words, so a block costs no more than its symbols and half a byte.
"""

from __future__ import annotations

import numpy as np
from gossamer.comm.codec.hazard import GUIDE_SHIFT, NODE_BITS, SCALE_BITS, WINDOW
from gossamer.comm.codec.kernels import (
    DIRECT_STEPS,
    STEP_BITS,
    compiled,
    step_symbol,
    take_step,
    zigzag_step,
)
from gossamer.comm.codec.lanes import STRIDE, sum_stride
from numba import uint64 as u64

LOW = 1 << 47
"""The rANS state is refilled below this."""
NODE_MASK = (1 << NODE_BITS) - 1
SCALE = 1 << SCALE_BITS

# what decode_block returns instead of a count
TOO_MANY, BAD_STEP, BAD_END = -1, -2, -3


@compiled
def cumulative_at(cumulative, length):
    """The distribution function at `length`, times 2**36."""
    node = u64(length >> NODE_BITS)
    below = cumulative[node]
    return below + (((cumulative[node + u64(1)] - below) * (length & NODE_MASK)) >> NODE_BITS)


@compiled
def sum_lengths(old, at, count, lengths, table, shape):
    """Length of `old` [at, at + count)."""
    total, stop = np.int64(0), at + count
    if shape[3] >= 0:
        while at + STRIDE <= stop:
            total += sum_stride(old, u64(at), STRIDE, table, shape)
            at += STRIDE
        return total + sum_stride(old, u64(at), stop - at, table, shape)
    while at < stop:
        total += lengths[u64(old[u64(at)]) >> u64(shape[0])]
        at += 1
    return total


@compiled
def skip(old, at, stop, length, limit, lengths, table, shape):
    """(place, length) as many strides on from `at` as end at `limit` or before."""
    while at + STRIDE <= stop:
        if shape[3] >= 0:
            ahead = sum_stride(old, u64(at), STRIDE, table, shape)
        else:
            ahead = sum_lengths(old, at, STRIDE, lengths, table, shape)
        if length + ahead > limit:
            break
        length += ahead
        at += STRIDE
    return at, length


@compiled
def leave_windows(old, lo, begin, target, lengths, table, shape, cumulative, out, count):
    """Lists the symbols of full words that end at WINDOW or more behind `begin`; returns the number
    of symbols and where the last of those words ends."""
    starts, sizes, scales = out
    at = begin - ((begin - lo) & 3)
    length = -sum_lengths(old, at, begin - at, lengths, table, shape)
    while at + 4 <= target:
        at, length = skip(old, at, target, length, WINDOW - 1, lengths, table, shape)
        if at + 4 > target:
            break
        length += sum_lengths(old, at, 4, lengths, table, shape)
        at += 4
        if length >= WINDOW:
            starts[count] = cumulative_at(cumulative, length)
            sizes[count] = SCALE - starts[count]
            scales[count] = SCALE_BITS
            count += 1
            length, begin = np.int64(0), at
    return count, begin


@compiled
def list_symbols(
    old, lo, hi, positions, after, lengths, table, shape, class_of, steps, order, cumulative, out
):
    """Symbols of one block, in the order of the decoder: (start, size, bits of the scale) each.

    `old` [lo, hi) is the block, `positions` its changes, `after` their new patterns; `class_of` by
    prefix; `steps` [class, symbol + 1] cumulative out of 4096; `order` is (sign, kind). Returns
    their number.
    """
    sign, kind = order
    starts, sizes, scales = out
    count, begin = 0, np.int64(lo)
    num_changes = len(positions)
    for change in range(num_changes + 1):
        target = np.int64(positions[change]) if change < num_changes else np.int64(hi)
        before_it = sum_lengths(old, begin, target - begin, lengths, table, shape)
        if before_it >= WINDOW:
            count, begin = leave_windows(
                old, lo, begin, target, lengths, table, shape, cumulative, out, count
            )
            before_it = sum_lengths(old, begin, target - begin, lengths, table, shape)
        starts[count] = cumulative_at(cumulative, before_it)
        scales[count] = SCALE_BITS
        if change == num_changes:
            sizes[count] = SCALE - starts[count]
            return count + 1
        before = old[u64(target)]
        prefix = u64(before) >> u64(shape[0])
        behind_it = before_it + lengths[prefix]
        sizes[count] = cumulative_at(cumulative, behind_it) - starts[count]
        begin = target + 1
        symbol, bits, value = step_symbol(zigzag_step(before, after[change], sign, kind))
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
def code_symbols(out, count, words, data):
    """Writes `count` symbols at the end of `data`, bytes that `words` (uint16) are too; returns
    where they begin."""
    starts, sizes, scales = out
    at = u64(len(words))
    state = u64(1)
    for i in range(count - 1, -1, -1):
        size, scale = u64(sizes[i]), u64(scales[i])
        if size == u64(1) << scale:
            continue
        limit = ((u64(LOW) >> scale) << u64(16)) * size
        # whether a word goes out is anyone's guess: no branch for the first
        words[at - u64(1)] = state
        goes_out = u64(state >= limit)
        at -= goes_out
        state >>= goes_out << u64(4)
        while state >= limit:
            at -= u64(1)
            words[at] = state
            state >>= u64(16)
        whole = state // size
        state = (whole << scale) + (state - whole * size) + u64(starts[i])
    while state > u64(255):
        at -= u64(1)
        words[at] = state
        state >>= u64(16)
    at <<= u64(1)
    if state:
        at -= u64(1)
        data[at] = state
    return at


@compiled
def code_blocks(
    old, block_size, positions, edges, after, lengths, table, shape, class_of, steps, order,
    cumulative, out, words, scratch, data, ends,
):  # fmt: skip
    """Codes the changes [edges[i], edges[i + 1]) of each block i, one behind the other into `data`;
    `ends` says where each stops. `words` and `scratch` are the same bytes."""
    filled = np.int64(0)
    for block in range(len(ends)):
        first, last = edges[block], edges[block + 1]
        if last > first:
            lo = block * block_size
            symbols = list_symbols(
                old, lo, min(lo + block_size, len(old)), positions[first:last], after[first:last],
                lengths, table, shape, class_of, steps, order, cumulative, out,
            )  # fmt: skip
            begin = np.int64(code_symbols(out, symbols, words, scratch))
            size = len(scratch) - begin
            data[filled : filled + size] = scratch[begin:]
            filled += size
        ends[block] = filled


@compiled
def refilled(state, data, at):
    """The state and the place in `data` after reading as many words as it takes."""
    while state < u64(LOW) and at + 1 < len(data):
        i = u64(at)
        state = (state << u64(16)) | u64(data[i]) | (u64(data[i + u64(1)]) << u64(8))
        at += 2
    return state, at


@compiled
def farthest(state, cumulative, guide):
    """The greatest length that ends at or before the state's place in the distribution."""
    place = np.int64(state & u64(SCALE - 1))
    node = u64(guide[u64(place >> GUIDE_SHIFT)])
    while cumulative[node + u64(1)] <= place:
        node += u64(1)
    below = cumulative[node]
    size = u64(cumulative[node + u64(1)] - below)
    part = ((u64(place - below + 1) << u64(NODE_BITS)) - u64(1)) // size
    return np.int64(node << u64(NODE_BITS)) + np.int64(part)


@compiled
def without(state, start, size):
    """The state before a symbol of the 2**36 scale was coded."""
    place = state & u64(SCALE - 1)
    return u64(size) * (state >> u64(SCALE_BITS)) + place - u64(start)


@compiled
def read_step(state, data, at, steps, row):
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
def word_lengths(old, word, hi, lengths, table, shape):
    """Lengths of the four elements from `word` on, 0 for those from `hi` on."""
    i, lengths, shift = u64(word), lengths, u64(shape[0])
    if word + 4 <= hi:
        return (
            lengths[u64(old[i]) >> shift],
            lengths[u64(old[i + u64(1)]) >> shift],
            lengths[u64(old[i + u64(2)]) >> shift],
            lengths[u64(old[i + u64(3)]) >> shift],
        )
    return (
        lengths[u64(old[i]) >> shift],
        lengths[u64(old[i + u64(1)]) >> shift] if word + 1 < hi else np.int64(0),
        lengths[u64(old[i + u64(2)]) >> shift] if word + 2 < hi else np.int64(0),
        np.int64(0),
    )


@compiled
def read_changes(
    old, word, data, class_of, steps, shift, sign, kind, cumulative, guide, positions, patterns,
    ends, state, at, count, target,
):  # fmt: skip
    """Decodes the changes in one word, whose elements end at lengths `ends` [1:].

    Returns (state, place in data, count, target), count negative where the block is broken. `ends`
    count from the last change on then.
    """
    while ends[4] > target:
        lane = u64(
            np.int64(ends[1] <= target) + np.int64(ends[2] <= target) + np.int64(ends[3] <= target)
        )
        behind = ends[lane + u64(1)]
        start = cumulative_at(cumulative, ends[lane])
        state = without(state, start, cumulative_at(cumulative, behind) - start)
        state, at = refilled(state, data, at)
        if count == len(positions):
            count = np.int64(TOO_MANY)
            break
        before = old[u64(word) + lane]
        zigzag, state, at = read_step(state, data, at, steps, class_of[u64(before) >> shift])
        if zigzag > 2 * sign - 2:
            count = np.int64(BAD_STEP)
            break
        positions[count] = word + np.int64(lane)
        patterns[count] = take_step(before, zigzag, sign, kind)
        count += 1
        for end in range(5):
            ends[end] -= behind
        target = farthest(state, cumulative, guide)
    return state, at, count, target


@compiled
def decode_block(
    old, lo, hi, data, lengths, table, shape, class_of, steps, order, tables, count, found
):
    """Decodes `data` on `old` [lo, hi); appends to `found` (positions, patterns) from `count` on.

    Returns the new count, or TOO_MANY, BAD_STEP, BAD_END. Reads and writes inside its arrays
    whatever the data; every turn of a loop moves on in `old` or in the lanes of a word.
    """
    sign, kind = order
    cumulative, guide = tables
    positions, patterns = found
    state, at = u64(0), 0
    if len(data) & 1:
        state, at = u64(data[0]), 1
    state, at = refilled(state, data, at)
    target = farthest(state, cumulative, guide)
    ends = np.empty(5, np.int64)
    length, word, count = np.int64(0), np.int64(lo), np.int64(count)
    may_skip, first_count = True, count
    while word < hi:
        limit = min(target, WINDOW - 1)
        if may_skip:
            word, length = skip(old, word, hi, length, limit, lengths, table, shape)
            may_skip = False
            if word >= hi:
                break
        first, second, third, fourth = word_lengths(old, word, hi, lengths, table, shape)
        end = length + ((first + second) + (third + fourth))
        if end > limit:
            ends[0], ends[1], ends[4] = length, length + first, end
            ends[2] = ends[1] + second
            ends[3] = ends[2] + third
            state, at, count, target = read_changes(
                old, word, data, class_of, steps, u64(shape[0]), sign, kind, cumulative, guide,
                positions, patterns, ends, state, at, count, target,
            )  # fmt: skip
            if count < 0:
                return count
            end = ends[4]
            if end >= WINDOW and word + 4 <= hi:
                start = cumulative_at(cumulative, end)
                state = without(state, start, SCALE - start)
                state, at = refilled(state, data, at)
                end = np.int64(0)
                target = farthest(state, cumulative, guide)
            # where changes are close to each other most strides hold one
            may_skip = word - lo > 2 * STRIDE * (count - first_count)
        length = end
        word += 4
    start = cumulative_at(cumulative, length)
    state = without(state, start, SCALE - start)
    state, at = refilled(state, data, at)
    return count if state == u64(1) and at == len(data) else np.int64(BAD_END)
