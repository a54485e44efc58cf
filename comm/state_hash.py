"""A hash of the whole state of a model that a delta updates in time proportional to its changes.

The one idea: the hash is the sum, over all elements, of a well-mixed 64-bit word of (tensor, flat
index, bit pattern), mod 2**64. Sums add up over parts, and a changed element swaps one word. It
guards against mistakes and broken memory; against an adversary there are signatures (signing.py).
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from gossamer.comm.codec.kernels import compiled
from gossamer.comm.run import Run
from numba import uint64 as u64

MASK_64 = 2**64 - 1
# odd: indices of one tensor are spread over all words
SPREAD = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def tensor_seed(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """What keeps the words of one tensor apart from those of all others."""
    text = json.dumps([name, dtype, shape]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def run_seed(run: Run) -> int:
    """The seed of a run's tensor, moved to the run's first element."""
    seed = tensor_seed(run.name, run.dtype, run.shape)
    return (seed + run.start * SPREAD) & MASK_64


def hash_elements(bits: np.ndarray, seed: int) -> int:
    """Sum over flat `bits` (unsigned); `seed` is that of their first element."""
    return int(_sum_elements(bits, np.uint64(seed)))


def hash_change(seed: int, positions: np.ndarray, old: np.ndarray, new: np.ndarray) -> int:
    """What the sum gains when the elements at `positions` go from `old` to `new` bits."""
    return int(_sum_change(np.uint64(seed), positions, old, new))


def hash_change_at(seed: int, positions: np.ndarray, bits: np.ndarray, new: np.ndarray) -> int:
    """The same where the old ones are still in their places in `bits`."""
    return int(_sum_change_at(np.uint64(seed), positions, bits, new))


def format_hash(total: int) -> str:
    """A state hash as manifests hold it."""
    return f"{total & MASK_64:016x}"


@compiled
def _mixed(word):  # noqa: ANN001, ANN202
    """The splitmix64 finaliser."""
    word = (word ^ (word >> u64(31))) * u64(MIX_1)
    word = (word ^ (word >> u64(31))) * u64(MIX_2)
    return word ^ (word >> u64(31))


@compiled
def _sum_elements(bits, seed):  # noqa: ANN001, ANN202
    total = u64(0)
    for at in range(len(bits)):
        total += _mixed((seed + u64(at) * u64(SPREAD)) ^ u64(bits[at]))
    return total


@compiled
def _sum_change(seed, positions, old, new):  # noqa: ANN001, ANN202
    total = u64(0)
    for at in range(len(positions)):
        word = seed + u64(positions[at]) * u64(SPREAD)
        total += _mixed(word ^ u64(new[at])) - _mixed(word ^ u64(old[at]))
    return total


@compiled
def _sum_change_at(seed, positions, bits, new):  # noqa: ANN001, ANN202
    total = u64(0)
    for at in range(len(positions)):
        place = u64(positions[at])
        word = seed + place * u64(SPREAD)
        total += _mixed(word ^ u64(new[at])) - _mixed(word ^ u64(bits[place]))
    return total
