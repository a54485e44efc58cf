"""The trainer's side of the proof: the state hash of what its masters would be published as.

The one idea: it is computed from the masters in full, not from what was published, so equality with
an engine's audit speaks for the whole way from the optimizer to the live tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from gossamer.comm.codec.bits import dtype_name, tensor_bits
from gossamer.comm.codec.part import Rows
from gossamer.comm.run import Run
from gossamer.comm.state_hash import format_hash, hash_elements, run_seed
from gossamer.parallel.gather import gather_texts


def trainer_state_hash(rows: Iterable[Rows]) -> str:
    """State hash over all ranks' rows. A collective call; each rank gives the rows it owns."""
    total = 0
    for each in rows:
        dtype, bits = dtype_name(each.values.dtype), tensor_bits(each.values)
        run = Run(each.name, dtype, tuple(each.shape), each.row_start, len(each.values))
        total += hash_elements(bits, run_seed(run))
    return format_hash(sum(map(json.loads, gather_texts(json.dumps(total)))))
