"""Runs of rows to blocks and back, each block by the codec that makes it smallest.

The one idea: changes are found once per run and shared by the codecs, the hash and the
publisher's base. A run is bounded, and with it all that encoding and decoding allocate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from gossamer.comm.codec import Codec, build_codec
from gossamer.comm.wire import BLOCK_ROWS, Block, Run

MAX_RUN_ELEMENTS = 1 << 20
# what a sparse block must save over a dense one: its entry in the table may cost more
MIN_SAVED_BYTES = 16
# a sparse block this much smaller than the raw patterns is kept without a look at the dense one
SURELY_SPARSE = 1 / 16


def split_rows(num_rows: int, row_elements: int) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of runs of whole 64-row blocks and about MAX_RUN_ELEMENTS."""
    blocks = max(1, MAX_RUN_ELEMENTS // (BLOCK_ROWS * row_elements))
    for start in range(0, num_rows, blocks * BLOCK_ROWS):
        yield start, min(start + blocks * BLOCK_ROWS, num_rows)


class RunCodec:
    """The registered codecs, made once for one thread."""

    def __init__(self, zstd_level: int = 1) -> None:
        self._zstd_level = zstd_level
        self._codecs: dict[str, Codec] = {}

    def encode_dense(self, run: Run, new: np.ndarray) -> list[Block]:
        """All blocks of a run, for an anchor."""
        starts = np.arange(0, len(new), run.block_elements)
        return self._codec("dense").encode(new, new, starts, run.block_elements)

    def encode_changes(
        self, run: Run, old: np.ndarray, new: np.ndarray, positions: np.ndarray
    ) -> list[Block]:
        """Blocks that changed, none of them larger than its dense form."""
        size = run.block_elements
        sparse = self._codec("step").encode(old, new, positions, size)
        return [self._smaller(block, new, size) for block in sparse]

    def decode(self, run: Run, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the run, ascending within a codec's blocks, and new bits. Raises WireError.

        `old` is the run's live bit patterns.
        """
        names = sorted({block.codec for block in run.blocks})
        found = [
            self._codec(name).decode(
                [block for block in run.blocks if block.codec == name], old, run.block_elements
            )
            for name in names
        ]
        if len(found) == 1:
            return found[0]
        positions = [np.empty(0, np.int64), *(each[0] for each in found)]
        patterns = [np.empty(0, old.dtype), *(each[1] for each in found)]
        return np.concatenate(positions), np.concatenate(patterns)

    def _smaller(self, block: Block, new: np.ndarray, block_elements: int) -> Block:
        patterns = new[block.index * block_elements : (block.index + 1) * block_elements]
        saved_for_sure = len(block.payload) < SURELY_SPARSE * patterns.nbytes - MIN_SAVED_BYTES
        if saved_for_sure:
            return block
        first = np.zeros(1, np.int64)
        (dense,) = self._codec("dense").encode(patterns, patterns, first, block_elements)
        if len(block.payload) + MIN_SAVED_BYTES < len(dense.payload):
            return block
        return dataclasses.replace(dense, index=block.index)

    def _codec(self, name: str) -> Codec:
        if name not in self._codecs:
            self._codecs[name] = build_codec(name, self._zstd_level)
        return self._codecs[name]
