"""What public systems send for a weight update, as small NumPy functions, one thread each.

The one idea: each peer gets the best of cases, so that a comparison is not flattering to us. Both
sides know names and shapes (no headers are sent), no peer spends time on hashing, and all of them
decode beside the engine before they stop it, which few of the systems do.

    full copy          the patterns as they are
    int32+bf16         int32 positions and new patterns (SparseRL-Sync's code, verl, vLLM sparse)
    gap+xor+zstd-1     gaps between positions and XOR of the patterns, as byte planes (NeMo-RL)
    xor+zstd-1         XOR of all patterns (slime, SkyRL)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

Weights = dict[str, np.ndarray]
"""Flat unsigned bit patterns by tensor name; both sides hold the same names and sizes."""
Changes = list[tuple[np.ndarray, np.ndarray]]
"""For each tensor: positions, and new patterns or XOR at them."""
ZSTD_LEVEL = 1
OURS = "gossamer"
"""What the rows call our own codec, which is none of these."""
NARROW, WIDE = np.dtype("<u2"), np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to bring `live` from the old weights to the new ones."""

    name: str
    encode: Callable[[Weights, Weights], bytes]
    """(old, new) to what is sent."""
    decode: Callable[[bytes, Weights], Any]
    """(bytes, live) to what `commit` takes; `live` is only read."""
    commit: Callable[[Any, Weights], None]
    """Writes into `live`."""


def encode_full(old: Weights, new: Weights) -> bytes:
    return b"".join(array.data for array in new.values())


def decode_full(data: bytes, live: Weights) -> list[np.ndarray]:
    arrays, at = [], 0
    for tensor in live.values():
        arrays.append(np.frombuffer(data, tensor.dtype, len(tensor), at))
        at += tensor.nbytes
    return arrays


def commit_full(arrays: list[np.ndarray], live: Weights) -> None:
    for tensor, array in zip(live.values(), arrays, strict=True):
        tensor[:] = array


def encode_pairs(old: Weights, new: Weights) -> bytes:
    found = [(np.flatnonzero(old[name] != new[name]), new[name]) for name in new]
    counts = np.array([len(positions) for positions, _ in found], WIDE)
    all_positions = [positions.astype("<i4") for positions, _ in found]
    values = [array[positions] for positions, array in found]
    return b"".join(array.data for array in (counts, *all_positions, *values))


def decode_pairs(data: bytes, live: Weights) -> Changes:
    counts = np.frombuffer(data, WIDE, len(live)).tolist()
    at = WIDE.itemsize * len(live)
    values_at = at + 4 * sum(counts)
    changes = []
    for count, tensor in zip(counts, live.values(), strict=True):
        positions = np.frombuffer(data, "<i4", count, at)
        changes.append((positions, np.frombuffer(data, tensor.dtype, count, values_at)))
        at, values_at = at + positions.nbytes, values_at + changes[-1][1].nbytes
    return changes


def commit_pairs(changes: Changes, live: Weights) -> None:
    for tensor, (positions, patterns) in zip(live.values(), changes, strict=True):
        tensor[positions] = patterns


def encode_gaps(old: Weights, new: Weights) -> bytes:
    """Counts, the width of each tensor's gaps, and zstd of each byte plane over all tensors."""
    gaps: list[np.ndarray] = []
    xors: list[np.ndarray] = []
    for name, after in new.items():
        before = old[name]
        positions = np.flatnonzero(before != after)
        gap = np.diff(positions, prepend=-1) - 1
        gaps.append(gap.astype(NARROW if gap.max(initial=0) < 1 << 16 else WIDE))
        xors.append(before[positions] ^ after[positions])
    head = [len(gap) << 1 | (gap.dtype == WIDE) for gap in gaps]
    compress = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress
    planes = [compress(plane) for arrays in (gaps, xors) for plane in _split(arrays)]
    sizes = [len(plane) for plane in planes]
    return b"".join([np.array([*head, *sizes], "<u8").tobytes(), *planes])


def decode_gaps(data: bytes, live: Weights) -> Changes:
    head = np.frombuffer(data, "<u8", len(live)).tolist()
    gap_dtypes = [WIDE if word & 1 else NARROW for word in head]
    xor_dtypes = [tensor.dtype for tensor in live.values()]
    at = 8 * len(live)
    widths = [max((dtype.itemsize for dtype in ds), default=0) for ds in (gap_dtypes, xor_dtypes)]
    sizes = np.frombuffer(data, "<u8", sum(widths), at).tolist()
    at += 8 * len(sizes)
    decompress = zstandard.ZstdDecompressor().decompress
    planes = []
    for size in sizes:
        planes.append(decompress(memoryview(data)[at : at + size]))
        at += size
    counts = [word >> 1 for word in head]
    gaps = _join(planes[: widths[0]], gap_dtypes, counts)
    xors = _join(planes[widths[0] :], xor_dtypes, counts)
    return [
        (np.cumsum(gap, dtype=np.int64) + np.arange(len(gap)), xor)
        for gap, xor in zip(gaps, xors, strict=True)
    ]


def commit_gaps(changes: Changes, live: Weights) -> None:
    for tensor, (positions, xor) in zip(live.values(), changes, strict=True):
        tensor[positions] ^= xor


def encode_xor(old: Weights, new: Weights) -> bytes:
    compress = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress
    packed = [compress((old[name] ^ new[name]).data) for name in new]
    return b"".join([np.array([len(each) for each in packed], "<u8").tobytes(), *packed])


def decode_xor(data: bytes, live: Weights) -> list[np.ndarray]:
    decompress = zstandard.ZstdDecompressor().decompress
    sizes = np.frombuffer(data, "<u8", len(live)).tolist()
    arrays, at = [], 8 * len(live)
    for size, tensor in zip(sizes, live.values(), strict=True):
        raw = decompress(memoryview(data)[at : at + size])
        arrays.append(np.frombuffer(raw, tensor.dtype))
        at += size
    return arrays


def commit_xor(arrays: list[np.ndarray], live: Weights) -> None:
    for tensor, array in zip(live.values(), arrays, strict=True):
        tensor ^= array


PEERS = (
    Peer("full copy", encode_full, decode_full, commit_full),
    Peer("int32+bf16", encode_pairs, decode_pairs, commit_pairs),
    Peer("gap+xor+zstd-1", encode_gaps, decode_gaps, commit_gaps),
    Peer("xor+zstd-1", encode_xor, decode_xor, commit_xor),
)


def _split(arrays: list[np.ndarray]) -> Iterator[bytes]:
    """Plane i: byte i of every element of every array that has so many bytes."""
    rows = [array.view(np.uint8).reshape(len(array), array.itemsize) for array in arrays]
    for i in range(max((array.itemsize for array in arrays), default=0)):
        yield b"".join(row[:, i].tobytes() for row in rows if row.shape[1] > i)


def _join(planes: list[bytes], dtypes: list[np.dtype], counts: list[int]) -> list[np.ndarray]:
    """The arrays that `_split` took apart."""
    arrays = [np.empty(n, dtype) for n, dtype in zip(counts, dtypes, strict=True)]
    for i, plane in enumerate(planes):
        at, patterns = 0, np.frombuffer(plane, np.uint8)
        for array in arrays:
            if array.itemsize > i:
                array.view(np.uint8)[i :: array.itemsize] = patterns[at : at + len(array)]
                at += len(array)
    return arrays
