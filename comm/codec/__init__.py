"""Codecs: how the changes of one run of rows become blocks of bytes, and back, bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import numpy as np
from gossamer.comm.run import Run, WireError

CODECS = {
    "dense": "gossamer.comm.codec.dense:DenseCodec",
    "planes": "gossamer.comm.codec.step:StepCodec",
    "entropy": "gossamer.comm.codec.entropy:EntropyCodec",
}


class Codec(Protocol):
    """Codes one run; made as `cls(zstd_level)`; for one thread at a time.

    `old` holds the run's flat bit patterns, unsigned, [num_elements]. The run says how many rows
    make a block and, where the codec needs one, which model it was coded with.
    """

    def encode(
        self, run: Run, old: np.ndarray, positions: np.ndarray | None, after: np.ndarray
    ) -> list[bytes]:
        """The payload of each block, empty where nothing changed in it.

        `after` are the new bit patterns at `positions` (uint32, ascending), or of the whole run
        where `positions` is None; only `dense` takes None, and it takes nothing else.
        """
        ...

    def decode(self, run: Run, old: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """Positions (uint32, ascending; None: all) and the new bit patterns there.

        Raises WireError on bytes that `encode` cannot make.
        """
        ...


def build_codec(name: str, zstd_level: int = 1) -> Codec:
    """A new codec. Raises WireError for a name that CODECS lacks: names come off the wire."""
    if name not in CODECS:
        raise WireError(f"codec {name!r} is not one of {', '.join(sorted(CODECS))}")
    module, attribute = CODECS[name].split(":")
    return getattr(import_module(module), attribute)(zstd_level)
