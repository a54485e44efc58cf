"""Dense blocks: every new bit pattern, raw or zstd. What anchors are made of; needs no base."""

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
        return [
            pack_plane(after[start : start + size].view(np.uint8), self._packer)
            for start in range(0, len(after), size)
        ]

    def decode(self, run: Run, old: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """See Codec.decode; of `old` only dtype and length count."""
        if run.count != len(old):
            raise WireError(f"{run.name} is dense and holds {run.count} of {len(old)} elements")
        after = np.empty_like(old)
        for lo, hi, payload in run.blocks():
            reader = PlaneReader(payload, self._unpacker)
            nbytes = (hi - lo) * old.itemsize
            plane = reader.read(nbytes)
            reader.close()
            if len(plane) != nbytes:
                raise WireError(f"a dense block of {run.name} does not hold {hi - lo} elements")
            after[lo:hi] = np.frombuffer(plane, old.dtype)
        return None, after
