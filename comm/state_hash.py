"""A hash of the whole state of a model that a delta updates in time proportional to its changes.

The one idea: a tensor's hash is the sum, over its elements, of a well-mixed 64-bit word of (flat
index, bit pattern), mod 2**64. Sums add up over parts, and a changed element swaps one word. It
guards against mistakes and broken memory, not against an adversary who solves for collisions.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import numpy as np
from gossamer.comm.wire import Run

MASK_64 = 2**64 - 1
# odd: an element's index is spread so that xor with up to 32 bits of pattern stays one to one
SPREAD = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
SHIFT = np.uint64(31)
CHUNK_ELEMENTS = 1 << 15


class TensorHash(NamedTuple):
    """Hash of one tensor and what else must be equal for two tensors to be the same."""

    dtype: str
    shape: tuple[int, ...]
    sum: int


def hash_elements(bits: np.ndarray, start: int = 0) -> int:
    """Sum over flat `bits` (unsigned), the first of which has flat index `start` in its tensor."""
    total = 0
    for at in range(0, len(bits), CHUNK_ELEMENTS):
        part = bits[at : at + CHUNK_ELEMENTS]
        spread = np.arange(start + at, start + at + len(part), dtype=np.uint64)
        spread *= SPREAD
        total += _sum_mixed(spread, part)
    return total & MASK_64


def hash_change(positions: np.ndarray, old: np.ndarray, new: np.ndarray, start: int = 0) -> int:
    """What a tensor's sum gains when elements `start + positions` go from `old` to `new` bits."""
    total = 0
    for at in range(0, len(positions), CHUNK_ELEMENTS):
        here = slice(at, at + CHUNK_ELEMENTS)
        spread = positions[here].astype(np.uint64)
        spread += np.uint64(start)
        spread *= SPREAD
        total -= _sum_mixed(spread.copy(), old[here])
        total += _sum_mixed(spread, new[here])
    return total & MASK_64


def add_runs(tensors: dict[str, TensorHash], runs: list[Run]) -> dict[str, TensorHash]:
    """The hashes after `runs`, whose tables carry what each adds; `tensors` stays as it is."""
    after = dict(tensors)
    for run in runs:
        before = after[run.name].sum if run.name in after else 0
        after[run.name] = TensorHash(run.dtype, run.shape, (before + run.hash_sum) & MASK_64)
    return after


def state_hash(tensors: dict[str, TensorHash]) -> str:
    """blake2b-256 (hex) over the sorted names with dtype, shape and sum."""
    rows = [[name, *tensors[name]] for name in sorted(tensors)]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=32).hexdigest()


def _sum_mixed(words: np.ndarray, bits: np.ndarray) -> int:
    """Sum of the splitmix64 finaliser over `words ^ bits`; overwrites `words`."""
    words ^= bits
    shifted = words >> SHIFT
    words ^= shifted
    words *= MIX_1
    np.right_shift(words, SHIFT, out=shifted)
    words ^= shifted
    words *= MIX_2
    np.right_shift(words, SHIFT, out=shifted)
    words ^= shifted
    return int(words.sum())
