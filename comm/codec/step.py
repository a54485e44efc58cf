"""Sparse blocks: where bit patterns changed, and by how many neighbours each moved.

The one idea: an optimizer step moves most changed bf16 weights to the next bit pattern or the one
after, so a change costs one gap and one small step (bits.py). Steps are split in byte planes;
positions are gaps (a byte each, 255 adding up) or a bitmap, whichever is smaller.
"""

from __future__ import annotations

import numpy as np
import zstandard
from gossamer.comm.codec.bits import apply_steps, steps_between
from gossamer.comm.codec.planes import PlaneReader, pack_plane
from gossamer.comm.wire import Block, WireError

GAPS, BITMAP = b"\0", b"\1"
# below one change in 32 elements a bitmap never wins
BITMAP_FROM_DENSITY = 1 / 32


class StepCodec:
    """Codes changed elements alone; decodes on the old bit patterns of the same block."""

    def __init__(self, zstd_level: int = 1) -> None:
        self._packer = zstandard.ZstdCompressor(level=zstd_level)
        self._unpacker = zstandard.ZstdDecompressor()

    def encode(
        self, old: np.ndarray, new: np.ndarray, positions: np.ndarray, block_elements: int
    ) -> list[Block]:
        """See Codec.encode."""
        # a changed element steps at least once: 1 is written as 0
        steps = steps_between(old[positions], new[positions]) - 1
        planes = np.ascontiguousarray(steps.view(np.uint8).reshape(-1, steps.itemsize).T)
        num_blocks = -(-len(old) // block_elements)
        starts = np.arange(num_blocks + 1) * block_elements
        edges = np.searchsorted(positions, starts).tolist()
        blocks = []
        for index in range(num_blocks):
            first, last = edges[index], edges[index + 1]
            if first == last:
                continue
            start = index * block_elements
            size = min(len(old) - start, block_elements)
            payload = [self._pack_positions(positions[first:last] - start, size)]
            payload += [pack_plane(plane[first:last], self._packer) for plane in planes]
            blocks.append(Block("step", index, last - first, b"".join(payload)))
        return blocks

    def decode(
        self, blocks: list[Block], old: np.ndarray, block_elements: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Codec.decode."""
        if not blocks:
            return np.empty(0, np.int64), np.empty(0, old.dtype)
        positions = []
        planes: list[list[bytes | memoryview]] = [[] for _ in range(old.itemsize)]
        for block in blocks:
            start = block.index * block_elements
            size = min(len(old) - start, block_elements)
            reader = PlaneReader(block.payload[1:], self._unpacker)
            positions.append(_read_positions(bytes(block.payload[:1]), reader, block, size) + start)
            for plane in planes:
                plane.append(reader.read(block.count))
                if len(plane[-1]) != block.count:
                    raise WireError(f"a plane of block {block.index} is not one byte a change")
            reader.close()
        where = np.concatenate(positions)
        steps = np.empty((len(where), old.itemsize), np.uint8)
        for place, plane in enumerate(planes):
            steps[:, place] = np.frombuffer(b"".join(plane), np.uint8)
        return where, apply_steps(old[where], steps.reshape(-1).view(old.dtype) + 1)

    def _pack_positions(self, positions: np.ndarray, size: int) -> bytes:
        gaps = np.diff(positions, prepend=-1) - 1
        packed = GAPS + pack_plane(_gap_bytes(gaps), self._packer)
        if len(positions) < size * BITMAP_FROM_DENSITY:
            return packed
        mask = np.zeros(size, np.bool_)
        mask[positions] = True
        bitmap = BITMAP + pack_plane(np.packbits(mask), self._packer)
        return min(packed, bitmap, key=len)


def _gap_bytes(gaps: np.ndarray) -> np.ndarray:
    """Each gap as its remainder by 255 after as many bytes of 255 as it holds."""
    if gaps.max() < 255:
        return gaps.astype(np.uint8)
    escapes, remainders = np.divmod(gaps, 255)
    ends = np.cumsum(escapes + 1) - 1
    plane = np.full(ends[-1] + 1, 255, np.uint8)
    plane[ends] = remainders
    return plane


def _read_positions(kind: bytes, reader: PlaneReader, block: Block, size: int) -> np.ndarray:
    """Sorted positions (int64) of `block.count` changes in a block of `size` elements."""
    if kind == BITMAP:
        plane = np.frombuffer(reader.read(-(-size // 8)), np.uint8)
        positions = np.flatnonzero(np.unpackbits(plane))
    elif kind == GAPS:
        positions = _read_gaps(reader, block.count, size)
    else:
        raise WireError(f"block {block.index} codes its positions in an unknown way {kind!r}")
    if len(positions) != block.count or positions[-1] >= size:
        raise WireError(f"block {block.index} does not hold {block.count} changes of {size}")
    return positions


def _read_gaps(reader: PlaneReader, count: int, size: int) -> np.ndarray:
    plane = np.frombuffer(reader.read(count, max_bytes=count + size // 255), np.uint8)
    sums = np.cumsum(plane, dtype=np.int64)
    ends = plane != 255
    if not ends.all():
        sums = sums[ends]
    return sums + np.arange(len(sums))
