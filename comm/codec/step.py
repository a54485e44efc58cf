"""Blocks of planes: where bit patterns changed, and by how many neighbours each moved, by zstd.

The one idea: an optimizer step moves most changed bf16 weights to the next bit pattern or the one
after, so a change costs one gap and one small step (bits.py). Steps are split in byte planes;
positions are gaps (a byte each, 255 adding up) or a bitmap, whichever is smaller. A block begins
with the number of its changes (4 bytes) and one byte that says which.
"""

from __future__ import annotations

import numpy as np
import zstandard
from gossamer.comm.codec.bits import apply_steps, steps_between
from gossamer.comm.codec.planes import PlaneReader, pack_plane
from gossamer.comm.run import Run, WireError

GAPS, BITMAP = b"\0", b"\1"
# below one change in 32 elements a bitmap never wins
BITMAP_FROM_DENSITY = 1 / 32


class StepCodec:
    """Codes changed elements alone; decodes on the old bit patterns of the same block."""

    def __init__(self, zstd_level: int = 1) -> None:
        self._packer = zstandard.ZstdCompressor(level=zstd_level)
        self._unpacker = zstandard.ZstdDecompressor()

    def encode(
        self, run: Run, old: np.ndarray, positions: np.ndarray | None, after: np.ndarray
    ) -> list[bytes]:
        """See Codec.encode."""
        assert positions is not None
        # a changed element steps at least once: 1 is written as 0
        steps = steps_between(old[positions], after) - 1
        planes = np.ascontiguousarray(steps.view(np.uint8).reshape(-1, steps.itemsize).T)
        size = run.block_rows * run.row_elements
        edges = np.searchsorted(positions, np.arange(run.num_blocks + 1) * size).tolist()
        payloads = []
        for index in range(run.num_blocks):
            first, last = edges[index], edges[index + 1]
            if first == last:
                payloads.append(b"")
                continue
            inside = positions[first:last].astype(np.int64) - index * size
            payload = [self._pack_positions(inside, min(len(old) - index * size, size))]
            payload += [pack_plane(plane[first:last], self._packer) for plane in planes]
            payloads.append(b"".join([_count_bytes(last - first), *payload]))
        return payloads

    def decode(self, run: Run, old: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """See Codec.decode."""
        positions = [np.empty(0, np.int64)]
        planes: list[list[bytes | memoryview]] = [[] for _ in range(old.itemsize)]
        for lo, hi, payload in run.blocks():
            if not payload:
                continue
            count = int.from_bytes(payload[:4], "little")
            reader = PlaneReader(payload[5:], self._unpacker)
            positions.append(_read_positions(bytes(payload[4:5]), reader, count, hi - lo) + lo)
            for plane in planes:
                plane.append(reader.read(count))
                if len(plane[-1]) != count:
                    raise WireError(f"a plane of {run.name} is not one byte a change")
            reader.close()
        where = np.concatenate(positions)
        if len(where) != run.count:
            raise WireError(f"{run.name} holds {len(where)} changes, its table says {run.count}")
        steps = np.empty((len(where), old.itemsize), np.uint8)
        for place, plane in enumerate(planes):
            steps[:, place] = np.frombuffer(b"".join(plane), np.uint8)
        patterns = apply_steps(old[where], steps.reshape(-1).view(old.dtype) + 1)
        return where.astype(np.uint32), patterns

    def _pack_positions(self, positions: np.ndarray, size: int) -> bytes:
        gaps = np.diff(positions, prepend=-1) - 1
        packed = GAPS + pack_plane(_gap_bytes(gaps), self._packer)
        if len(positions) < size * BITMAP_FROM_DENSITY:
            return packed
        mask = np.zeros(size, np.bool_)
        mask[positions] = True
        bitmap = BITMAP + pack_plane(np.packbits(mask), self._packer)
        return min(packed, bitmap, key=len)


def _count_bytes(count: int) -> bytes:
    return count.to_bytes(4, "little")


def _gap_bytes(gaps: np.ndarray) -> np.ndarray:
    """Each gap as its remainder by 255 after as many bytes of 255 as it holds."""
    if gaps.max() < 255:
        return gaps.astype(np.uint8)
    escapes, remainders = np.divmod(gaps, 255)
    ends = np.cumsum(escapes + 1) - 1
    plane = np.full(ends[-1] + 1, 255, np.uint8)
    plane[ends] = remainders
    return plane


def _read_positions(kind: bytes, reader: PlaneReader, count: int, size: int) -> np.ndarray:
    """Sorted positions (int64) of `count` changes in a block of `size` elements."""
    if not 0 < count <= size:
        raise WireError(f"a block of planes holds {count} changes of {size} elements")
    if kind == BITMAP:
        plane = np.frombuffer(reader.read(-(-size // 8)), np.uint8)
        positions = np.flatnonzero(np.unpackbits(plane))
    elif kind == GAPS:
        positions = _read_gaps(reader, count, size)
    else:
        raise WireError(f"a block codes its positions in an unknown way {kind!r}")
    if len(positions) != count or positions[-1] >= size:
        raise WireError(f"a block of planes does not hold {count} changes of {size} elements")
    return positions


def _read_gaps(reader: PlaneReader, count: int, size: int) -> np.ndarray:
    plane = np.frombuffer(reader.read(count, max_bytes=count + size // 255), np.uint8)
    sums = np.cumsum(plane, dtype=np.int64)
    ends = plane != 255
    if not ends.all():
        sums = sums[ends]
    return sums + np.arange(len(sums))
