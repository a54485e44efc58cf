"""Dense blocks: every new bit pattern, in byte planes. What anchors are made of; needs no base.

The one idea: sign and exponent lie in the high byte, and zstd makes a third of it; low bytes stay.
"""

from __future__ import annotations

import numpy as np
import zstandard
from gossamer.comm.codec.planes import PlaneReader, pack_plane
from gossamer.comm.run import Run, WireError


class DenseCodec:
    """Codes whole runs."""

    def __init__(self, zstd_level: int = 1) -> None:
        self._packer = zstandard.ZstdCompressor(level=zstd_level)
        self._unpacker = zstandard.ZstdDecompressor()

    def encode(
        self, run: Run, old: np.ndarray, positions: np.ndarray | None, after: np.ndarray
    ) -> list[bytes]:
        """See Codec.encode; `old` is not read."""
        size = run.block_rows * run.row_elements
        payloads = []
        for start in range(0, len(after), size):
            patterns = after[start : start + size].view(np.uint8).reshape(-1, after.itemsize)
            planes = np.ascontiguousarray(patterns.T)
            payloads.append(b"".join(pack_plane(plane, self._packer) for plane in planes))
        return payloads

    def decode(self, run: Run, old: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """See Codec.decode; of `old` only dtype and length count."""
        if run.count != len(old):
            raise WireError(f"{run.name} is dense and holds {run.count} of {len(old)} elements")
        after = np.empty_like(old)
        for lo, hi, payload in run.blocks():
            reader = PlaneReader(payload, self._unpacker)
            patterns = after[lo:hi].view(np.uint8).reshape(-1, old.itemsize)
            for byte in range(old.itemsize):
                plane = reader.read(hi - lo)
                if len(plane) != hi - lo:
                    raise WireError(f"a dense block of {run.name} does not hold {hi - lo} elements")
                patterns[:, byte] = np.frombuffer(plane, np.uint8)
            reader.close()
        return None, after
