"""Byte planes: arrays of bytes written as nothing (all zero), raw, or zstd, whichever is smallest.

Each plane is a LEB128 head, 3 * bytes + mode, and its bytes. Who reads one says how long it may
be once unpacked, so a forged plane cannot fill memory.
"""

from __future__ import annotations

import numpy as np
import zstandard
from gossamer.comm.run import WireError

ZERO, RAW, ZSTD = range(3)
# zstd's own header makes it useless below this
MIN_ZSTD_BYTES = 24


def pack_plane(plane: np.ndarray, zstd: zstandard.ZstdCompressor) -> bytes:
    """A plane (uint8) as bytes that `PlaneReader` reads back."""
    if not plane.any():
        return _head(0, ZERO)
    if len(plane) >= MIN_ZSTD_BYTES:
        packed = zstd.compress(plane.data)
        if len(packed) < len(plane):
            return _head(len(packed), ZSTD) + packed
    return _head(len(plane), RAW) + plane.tobytes()


class PlaneReader:
    """Reads the planes of one block's payload in turn. Raises WireError."""

    def __init__(self, payload: bytes | memoryview, zstd: zstandard.ZstdDecompressor) -> None:
        self._payload = memoryview(payload)
        self._zstd = zstd
        self._at = 0

    def read(self, num_zeros: int, max_bytes: int | None = None) -> bytes | memoryview:
        """The next plane: `num_zeros` long if all zero, else at most `max_bytes` (`num_zeros`)."""
        max_bytes = num_zeros if max_bytes is None else max_bytes
        head, shift = 0, 0
        while True:
            if self._at == len(self._payload) or shift > 42:
                raise WireError("a plane of a block has no head")
            byte = self._payload[self._at]
            self._at += 1
            head |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        nbytes, mode = divmod(head, 3)
        body = self._payload[self._at : self._at + nbytes]
        self._at += nbytes
        if len(body) < nbytes:
            raise WireError(f"a plane of {nbytes} bytes leaves its block")
        if mode == ZERO:
            return bytes(num_zeros)
        if mode == ZSTD:
            return self._unpack(body, max_bytes)
        if nbytes > max_bytes:
            raise WireError(f"a plane holds {nbytes} bytes where at most {max_bytes} fit")
        return body

    def close(self) -> None:
        """Raises WireError unless every byte of the payload was read."""
        if self._at != len(self._payload):
            raise WireError(f"a block has {len(self._payload) - self._at} bytes too many")

    def _unpack(self, body: memoryview, max_bytes: int) -> bytes:
        try:
            if not 0 <= zstandard.frame_content_size(body) <= max_bytes:
                raise WireError(f"a plane does not unpack to at most {max_bytes} bytes")
            return self._zstd.decompress(body)
        except zstandard.ZstdError as error:
            raise WireError(f"a plane is not zstd ({error})") from error


def _head(nbytes: int, mode: int) -> bytes:
    value = 3 * nbytes + mode
    head = bytearray()
    while value > 127:
        head.append(value & 127 | 128)
        value >>= 7
    head.append(value)
    return bytes(head)
