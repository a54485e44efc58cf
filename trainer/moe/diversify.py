"""EvoMoE's start: the one expert that was trained becomes all of them, each with a mask of its own.

The one idea: a checkpoint can be read by any topology, so reading another expert's rows than one's
own is all it takes: no expert travels between ranks but through the checkpoint.

Nie et al., 2021 (arXiv 2112.14397).
"""

from __future__ import annotations

import hashlib
import re

import torch
from gossamer.parallel.engine import Owned, ReadRows

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def diversified(read: ReadRows, masked_share: float, seed: int) -> ReadRows:
    """`read`, in which every expert is expert 0 with a share of its elements, and their moments, 0.

    Which ones is a function of the seed and the tensor's name, whatever rows are asked for.
    """

    def read_copy(name: str, row_start: int, row_stop: int) -> Owned:
        found = EXPERT.search(name)
        if found is None:
            return read(name, row_start, row_stop)
        first = read(f"{name[: found.start(1)]}0{name[found.end(1) :]}", row_start, row_stop)
        key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key))
        is_kept = torch.rand(first.shape, generator=generator)[row_start:row_stop] >= masked_share
        moments = {kind: values * is_kept for kind, values in first.moments.items()}
        return Owned(name, first.shape, row_start, row_stop, first.master * is_kept, moments)

    return read_copy
