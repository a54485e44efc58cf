"""The trainer's side of the proof: the state hash of what its masters would be published as.

The one idea: it is computed from the masters in full, not from what was published, so equality with
an engine's audit speaks for the whole way from the optimizer to the live tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

from gossamer.comm.codec.bits import dtype_name, tensor_bits
from gossamer.comm.codec.part import Rows
from gossamer.comm.state_hash import MASK_64, TensorHash, hash_elements, state_hash
from gossamer.parallel.gather import gather_texts


def trainer_state_hash(rows: Iterable[Rows]) -> str:
    """State hash over all ranks' rows. A collective call; each rank gives the rows it owns."""
    sums: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for run in rows:
        start = run.row_start * math.prod(run.shape[1:])
        before = sums.get(run.name, ("", (), 0))[2]
        added = hash_elements(tensor_bits(run.values), start)
        sums[run.name] = (dtype_name(run.values.dtype), run.shape, (before + added) & MASK_64)
    whole: dict[str, TensorHash] = {}
    for part in map(json.loads, gather_texts(json.dumps(sums))):
        for name, (dtype, shape, added) in part.items():
            before = whole[name].sum if name in whole else 0
            whole[name] = TensorHash(dtype, tuple(shape), (before + added) & MASK_64)
    return state_hash(whole)
