"""Entropy blocks: positions by the old value's class, steps given the class, near the entropy.

The one idea: sender and receiver walk over the same old values, so every element's probability of
changing is known to both before the first bit is read (hazard.py), and a change costs what it
surprises. The loops are in coder.py, the format in wire.py.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
from gossamer.comm.codec.coder import (
    BAD_END,
    BAD_STEP,
    TOO_MANY,
    code_blocks,
    decode_block,
)
from gossamer.comm.codec.elements import class_of_prefix, element_shape
from gossamer.comm.codec.hazard import CUMULATIVE, GUIDE, LENGTHS
from gossamer.comm.codec.kernels import NUM_STEP_SYMBOLS
from gossamer.comm.codec.lanes import Line, build_line
from gossamer.comm.run import Model, Run, WireError

KEPT_SYMBOLS = 1 << 17
# 36 bits at most
SYMBOL_BYTES = 5
FAULTS = {
    TOO_MANY: "holds more changes than its table says",
    BAD_STEP: "holds a step that leaves the dtype",
    BAD_END: "does not end where its changes do",
}


class EntropyCodec:
    """Codes changed elements alone, by the run's model; decodes on the old values of its rows."""

    def __init__(self, zstd_level: int = 1) -> None:
        """`zstd_level` is for codecs that use zstd; this one does not."""
        self._kept = _symbols(0)

    def _room(self, num_symbols: int) -> tuple[np.ndarray, ...]:
        """Room for so many symbols of a block, the same for most; large ones are not kept."""
        if num_symbols > KEPT_SYMBOLS:
            return _symbols(num_symbols)
        if num_symbols > len(self._kept[0]):
            self._kept = _symbols(num_symbols)
        return self._kept

    def encode(
        self, run: Run, old: np.ndarray, positions: np.ndarray, after: np.ndarray
    ) -> list[bytes]:
        """See Codec.encode; `run` has a model that can code these changes."""
        assert run.model is not None
        line, rows, steps = _tables(run.model, run.dtype)
        size, blocks = run.block_rows * run.row_elements, run.num_blocks
        edges = np.searchsorted(positions, np.arange(blocks + 1) * size)
        # at most four symbols a change, and one a word
        words_of_block = min(size, run.num_elements) // 4 + 2
        *out, words = self._room(4 * int(np.diff(edges).max()) + words_of_block)
        symbols = 4 * len(positions) + blocks * words_of_block
        data, ends = np.empty(SYMBOL_BYTES * symbols, np.uint8), np.empty(blocks, np.int64)
        code_blocks(
            old,
            size,
            positions,
            edges,
            after,
            *line,
            rows,
            steps,
            element_shape(run.dtype)[1:],
            CUMULATIVE,
            tuple(out),
            words,
            words.view(np.uint8),
            data,
            ends,
        )
        starts = [0, *ends.tolist()]
        return [data[a:b].tobytes() for a, b in pairwise(starts)]

    def decode(self, run: Run, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Codec.decode."""
        if run.model is None:
            raise WireError(f"{run.name} is coded by entropy and names no model")
        line, rows, steps = _tables(run.model, run.dtype)
        found = np.empty(run.count, np.uint32), np.empty(run.count, old.dtype)
        count = 0
        for lo, hi, payload in run.blocks():
            if not payload:
                continue
            count = decode_block(
                old,
                lo,
                hi,
                np.frombuffer(payload, np.uint8),
                *line,
                rows,
                steps,
                element_shape(run.dtype)[1:],
                (CUMULATIVE, GUIDE),
                count,
                found,
            )
            if count < 0:
                raise WireError(f"a block of {run.name} {FAULTS[count]}")
        if count != run.count:
            raise WireError(f"{run.name} holds {count} changes where its table says {run.count}")
        return found


def _symbols(number: int) -> tuple[np.ndarray, ...]:
    """Starts, sizes and scales of symbols, and 16-bit words to code them into."""
    words = np.empty(SYMBOL_BYTES * number // 2 + 8, np.uint16)
    return np.empty(number, np.int64), np.empty(number, np.int64), np.empty(number, np.uint8), words


@lru_cache(maxsize=256)
def _tables(model: Model, dtype: str) -> tuple[Line, np.ndarray, np.ndarray]:
    """Lengths of elements, model row by class prefix, cumulative frequencies by row."""
    line = build_line(dtype, model.first, LENGTHS[list(model.lengths)])
    steps = np.zeros((len(model.steps), NUM_STEP_SYMBOLS + 1), np.int64)
    for row, frequencies in zip(steps, model.steps, strict=True):
        row[1 : len(frequencies) + 1] = frequencies
    rows = np.clip(class_of_prefix(dtype) - model.first, 0, len(steps) - 1)
    return line, rows, steps.cumsum(axis=1)
