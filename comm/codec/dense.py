"""Dense blocks: every new bit pattern, raw or zstd. What anchors are made of; needs no base."""

from __future__ import annotations

import numpy as np
import zstandard
from gossamer.comm.codec.planes import PlaneReader, pack_plane
from gossamer.comm.wire import Block, WireError


class DenseCodec:
    """Codes whole blocks that hold a change."""

    def __init__(self, zstd_level: int = 1) -> None:
        self._packer = zstandard.ZstdCompressor(level=zstd_level)
        self._unpacker = zstandard.ZstdDecompressor()

    def encode(
        self, old: np.ndarray, new: np.ndarray, positions: np.ndarray, block_elements: int
    ) -> list[Block]:
        """See Codec.encode; `old` is not read."""
        blocks = []
        for index in np.unique(positions // block_elements).tolist():
            patterns = new[index * block_elements : (index + 1) * block_elements]
            plane = np.ascontiguousarray(patterns).view(np.uint8)
            payload = pack_plane(plane, self._packer)
            blocks.append(Block("dense", index, len(patterns), payload))
        return blocks

    def decode(
        self, blocks: list[Block], old: np.ndarray, block_elements: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Codec.decode."""
        positions, patterns = [np.empty(0, np.int64)], [np.empty(0, old.dtype)]
        for block in blocks:
            start = block.index * block_elements
            before = old[start : start + block_elements]
            reader = PlaneReader(block.payload, self._unpacker)
            plane = reader.read(before.nbytes)
            reader.close()
            if len(plane) != before.nbytes or block.count != len(before):
                raise WireError(f"dense block {block.index} does not hold {len(before)} elements")
            after = np.frombuffer(plane, old.dtype)
            changed = np.flatnonzero(before != after)
            positions.append(changed + start)
            patterns.append(after[changed])
        return np.concatenate(positions), np.concatenate(patterns)
