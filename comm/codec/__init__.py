"""Codecs: how the changes of one run of rows become blocks of bytes, and back, bit for bit."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import numpy as np
from gossamer.comm.wire import Block, WireError

CODECS = {
    "dense": "gossamer.comm.codec.dense:DenseCodec",
    "step": "gossamer.comm.codec.step:StepCodec",
}


class Codec(Protocol):
    """Codes the changed elements of a run; made as `cls(zstd_level)`; for one thread at a time.

    `old` and `new` are the run's flat bit patterns, unsigned, [num_elements]; block i holds
    elements [i * block_elements, (i + 1) * block_elements), the last one what is left.
    """

    def encode(
        self, old: np.ndarray, new: np.ndarray, positions: np.ndarray, block_elements: int
    ) -> list[Block]:
        """Blocks, by index, of those that hold a change at `positions` (int64, ascending)."""
        ...

    def decode(
        self, blocks: list[Block], old: np.ndarray, block_elements: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ascending positions (int64) in the run and the new bit patterns there.

        Reads `old` only inside of `blocks`. Raises WireError on bytes that `encode` cannot make.
        """
        ...


def build_codec(name: str, zstd_level: int = 1) -> Codec:
    """A new codec. Raises WireError for a name that CODECS lacks: names come off the wire."""
    if name not in CODECS:
        raise WireError(f"codec {name!r} is not one of {', '.join(sorted(CODECS))}")
    module, attribute = CODECS[name].split(":")
    return getattr(import_module(module), attribute)(zstd_level)
