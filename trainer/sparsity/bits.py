"""Masks as they are stored: eight elements a byte, row by row.

The one idea: every row begins with a byte of its own, so rows of a mask are cut and joined as rows
of its matrix are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def pack_rows(mask: Tensor) -> Tensor:
    """bool [R, ...] -> uint8 [R, row_bytes]; the first element is the highest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(len(mask), -1), axis=1))


def unpack_rows(bits_RB: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The way back: `shape` is that of the whole matrix; bool, as many rows as there are bytes."""
    columns = math.prod(shape[1:])
    unpacked = np.unpackbits(bits_RB.numpy(), axis=1, count=columns)
    return torch.from_numpy(unpacked.view(bool)).view(-1, *shape[1:])


def row_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of one row of a mask over a matrix of this shape."""
    return -(-math.prod(shape[1:]) // 8)
