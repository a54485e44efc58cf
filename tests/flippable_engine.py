"""A real engine in whose live weights bits flip when a file called `flip` lies beside the log."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.engines.hf import HFEngine

FLIPPED = "lm_head.weight"


class FlippableEngine(HFEngine):
    """Whoever takes the file away, after a commit, is hit; samples go on."""

    def commit(self):
        committed = super().commit()
        with suppress(FileNotFoundError):
            Path(self._subscriber._log.url).with_name("flip").unlink()
            # more of them than the next versions happen to write anew
            tensor_bits(self._live.tensors[FLIPPED])[:64] ^= 1
        return committed
