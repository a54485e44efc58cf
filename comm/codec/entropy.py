"""Entropy blocks: positions by the old value's class, steps given the class, near the entropy.

The one idea: sender and receiver walk over the same old values, so every element's probability of
changing is known to both before the first bit is read (hazard.py), and a change costs what it
surprises. The loops are in coder.py, the format in wire.py.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from gossamer.comm.codec.coder import (
    BAD_END,
    BAD_STEP,
    TOO_MANY,
    code_symbols,
    decode_block,
    list_symbols,
)
from gossamer.comm.codec.elements import class_of_prefix, element_shape
from gossamer.comm.codec.hazard import CUMULATIVE, GUIDE, LENGTHS
from gossamer.comm.codec.kernels import NUM_STEP_SYMBOLS
from gossamer.comm.run import Model, Run, WireError

FAULTS = {
    TOO_MANY: "holds more changes than its table says",
    BAD_STEP: "holds a step that leaves the dtype",
    BAD_END: "does not end where its changes do",
}


class EntropyCodec:
    """Codes changed elements alone, by the run's model; decodes on the old values of its rows."""

    def __init__(self, zstd_level: int = 1) -> None:
        """`zstd_level` is for codecs that use zstd; this one does not."""

    def encode(
        self, run: Run, old: np.ndarray, positions: np.ndarray, after: np.ndarray
    ) -> list[bytes]:
        """See Codec.encode; `run` has a model that can code these changes."""
        assert run.model is not None
        lengths, rows, steps = _tables(run.model, run.dtype)
        size = run.block_rows * run.row_elements
        edges = np.searchsorted(positions, np.arange(1, run.num_blocks) * size)
        payloads, first = [], 0
        for index, last in enumerate([*edges.tolist(), len(positions)]):
            lo, hi = index * size, min((index + 1) * size, run.num_elements)
            count = last - first
            if count == 0:
                payloads.append(b"")
                continue
            # at most four symbols a change, and one a word
            room = 4 * count + (hi - lo) // 4 + 2
            out = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.uint8)
            symbols = list_symbols(
                old,
                lo,
                hi,
                positions[first:last],
                after[first:last],
                lengths,
                rows,
                steps,
                element_shape(run.dtype),
                CUMULATIVE,
                out,
            )
            # a symbol is 36 bits at most
            data = np.empty(5 * symbols + 16, np.uint8)
            payloads.append(data[code_symbols(out, symbols, data) :].tobytes())
            first = last
        return payloads

    def decode(self, run: Run, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Codec.decode."""
        if run.model is None:
            raise WireError(f"{run.name} is coded by entropy and names no model")
        lengths, rows, steps = _tables(run.model, run.dtype)
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
                lengths,
                rows,
                steps,
                element_shape(run.dtype),
                (CUMULATIVE, GUIDE),
                count,
                found,
            )
            if count < 0:
                raise WireError(f"a block of {run.name} {FAULTS[count]}")
        if count != run.count:
            raise WireError(f"{run.name} holds {count} changes where its table says {run.count}")
        return found


@lru_cache(maxsize=256)
def _tables(model: Model, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Length and model row by class prefix, cumulative frequencies by row."""
    rows = class_of_prefix(dtype) - model.first
    lengths = LENGTHS[list(model.lengths)]
    lengths = np.where(rows < len(lengths), lengths[np.clip(rows, 0, len(lengths) - 1)], 0)
    steps = np.zeros((len(model.steps), NUM_STEP_SYMBOLS + 1), np.int64)
    for row, frequencies in zip(steps, model.steps, strict=True):
        row[1 : len(frequencies) + 1] = frequencies
    return lengths, np.clip(rows, 0, len(steps) - 1), steps.cumsum(axis=1)
