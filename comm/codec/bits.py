"""Weights as bit patterns: unsigned integers of the element's size.

The one idea: ordered as floats are (the total order map), neighbouring values have neighbouring
integers, so the step from an old weight to a new one is a small signed integer whatever their
exponent. NaN payloads, -0.0 and infinities are integers like all others.
"""

from __future__ import annotations

import numpy as np
import torch
from gossamer.comm.codec.lanes import find_changes

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32}


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def tensor_bits(tensor: torch.Tensor) -> np.ndarray:
    """Flat unsigned view on the storage of a contiguous CPU tensor of 1-, 2- or 4-byte elements.

    Raises ValueError when the tensor is none of these.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous CPU tensor, got one on {tensor.device}")
    if tensor.element_size() not in UNSIGNED:
        raise ValueError(f"expected elements of 1, 2 or 4 bytes, got {tensor.dtype}")
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().view(UNSIGNED[tensor.element_size()])


def find_changed(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where flat patterns differ (uint32, ascending), the old ones there, the new ones there."""
    pieces: list[tuple[np.ndarray, ...]] = []
    at, room = 0, len(old) // 32 + 64
    while at < len(old) or not pieces:
        found = np.empty(room, np.uint32), np.empty(room, old.dtype), np.empty(room, old.dtype)
        count, at = find_changes(old, new, at, found)
        for part in found:
            part.resize(int(count), refcheck=False)  # in place, which a copy is not
        pieces.append(found)
        room = 2 * room
    if len(pieces) == 1:
        return found
    positions, before, after = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return positions, before, after


def find_positions(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Where flat patterns differ, ascending, uint32."""
    return find_changed(old, new)[0]


def steps_between(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Zigzagged signed steps (unsigned, same size) from `old` to `new` bit patterns."""
    steps = _order(new)
    steps -= _order(old)
    signed = steps.view(SIGNED[steps.itemsize])
    sign = (signed >> (8 * steps.itemsize - 1)).view(steps.dtype)
    steps <<= 1
    steps ^= sign
    return steps


def apply_steps(old: np.ndarray, zigzag: np.ndarray) -> np.ndarray:
    """The new bit patterns: the inverse of `steps_between`."""
    keys = zigzag >> 1
    keys ^= -(zigzag & 1)
    keys += _order(old)
    bits = 8 * keys.itemsize
    # top bit set: was positive, clear the bit; else was negative, flip all
    keys ^= ((keys >> (bits - 1)) - 1) | keys.dtype.type(1 << (bits - 1))
    return keys


def _order(patterns: np.ndarray) -> np.ndarray:
    """Total order: negative patterns with all bits flipped, others with the sign bit set."""
    bits = 8 * patterns.itemsize
    return patterns ^ (-(patterns >> (bits - 1)) | patterns.dtype.type(1 << (bits - 1)))
