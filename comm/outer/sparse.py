"""The greatest elements of some rows in two bits each, and where they are: the bytes, and back.

The one idea: blocks are small enough to be told alone. Of every 4096 elements the k greatest
magnitudes are kept (topk.py), each becomes one of two magnitudes of its block with its sign
(quantise.py), and the gaps between places are in the Rice code that fits k, which is within 3% of
what positions must cost if every choice of k is as likely.

Matrices whose rows and columns are multiples of 64 are cut in blocks of 64 by 64, so that no row
and no column of weights has all of the budget; all else is cut in flat pieces of 4096, the last one
shorter with its share of k, at least 1. Blocks are those of the rows at hand, not of their tensor.

A run's bits, low ones first, blocks in order: 16 bits of levels (quantise.py), then for each kept
value its gap (elements passed over since the last one): gap >> r zeros and a one, r bits of the
rest; 1 for the upper level; 1 for a minus. Fewer than k end with the gap to the block's end. The
rest of the last byte is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.outer.quantise import HEAD_BITS
from gossamer.comm.outer.stream import FAULTS, code_run, read_run
from gossamer.comm.run import WireError

BLOCK = 4096
SIDE = 64
MAX_RUN_ELEMENTS = 2**32 - BLOCK


@dataclass(frozen=True, slots=True)
class Sparse:
    """Kept elements of some rows, as every receiver will see them."""

    positions: np.ndarray
    """Flat index in the rows, uint32, each once, block by block."""
    values: np.ndarray
    """Dequantised, fp32, none of them 0, [len(positions)]."""
    payload: bytes
    """Their code."""


class Cut(NamedTuple):
    """How rows are cut in blocks: each is `pieces` pieces of `piece` elements, `stride` apart."""

    num_blocks: int
    pieces: int
    piece: int
    stride: int

    @classmethod
    def of(cls, num_rows: int, row_elements: int) -> Cut:
        """Rows of one tensor; a vector is one row."""
        elements = num_rows * row_elements
        if num_rows % SIDE == row_elements % SIDE == 0:
            return cls(elements // BLOCK, SIDE, SIDE, row_elements)
        return cls(-(-elements // BLOCK), 1, BLOCK, elements)


def rice_bits(k: int) -> int:
    """The parameter of gaps between k places of 4096."""
    return max(0, round(math.log2(math.log(2) * BLOCK / k)))


def compress(rows: torch.Tensor, k: int) -> Sparse:
    """The greatest k of every 4096 elements of `rows`, fp32 [n, ...] (a vector is one row).

    Zeros are never kept, so that rows of zeros have no positions and no bytes. `rows` lie on the
    CPU, contiguous. Raises ValueError for other rows or k, and where an element is not finite.
    """
    if rows.dtype != torch.float32 or not 0 < rows.numel() <= MAX_RUN_ELEMENTS:
        raise ValueError(
            f"expected 1 to 2**32 - 4096 elements of float32, not {rows.dtype} {tuple(rows.shape)}"
        )
    _check_k(k)
    bits = tensor_bits(rows)
    num_rows = rows.shape[0] if rows.dim() > 1 else 1
    cut, rice = Cut.of(num_rows, len(bits) // num_rows), rice_bits(k)
    room = cut.num_blocks * k
    # zeros of all gaps in a block, and of the one to its end, are at most its size >> rice
    num_bits = cut.num_blocks * (HEAD_BITS + rice + 1 + (BLOCK >> rice)) + room * (rice + 3)
    words = np.empty(num_bits // 64 + 2, np.uint64)
    positions, values = np.empty(room, np.uint32), np.empty(room, np.float32)
    count, num_bits = code_run(
        bits, k, rice, *cut, positions, values.view(np.uint32), words
    )  # fmt: skip
    if count < 0:
        raise ValueError(f"element {num_bits} is not finite: NaN and infinity cannot be sent")
    payload = words.view(np.uint8)[: (num_bits + 7) // 8].tobytes() if count else b""
    return Sparse(positions[:count].copy(), values[:count].copy(), payload)


def decompress(
    payload: bytes | memoryview, k: int, count: int, num_rows: int, row_elements: int
) -> Sparse:
    """What `compress` returned for rows of which it kept `count`. Raises WireError for bytes that
    it cannot have made."""
    _check_k(k)
    rice = rice_bits(k)
    if count * (rice + 3) > 8 * len(payload):
        raise WireError(f"{len(payload)} bytes cannot hold {count} values")
    words = np.zeros(len(payload) // 8 + 3, np.uint64)
    words.view(np.uint8)[: len(payload)] = np.frombuffer(payload, np.uint8)
    positions, values = np.empty(count, np.uint32), np.empty(count, np.float32)
    status = read_run(
        words, 8 * len(payload), num_rows * row_elements, k, rice, *Cut.of(num_rows, row_elements),
        positions, values.view(np.uint32),
    )  # fmt: skip
    if status < 0:
        raise WireError(f"values of top-k are broken: {FAULTS[status]}")
    return Sparse(positions, values, bytes(payload))


def norm_of(values: np.ndarray) -> float:
    """Euclidean norm, added up in float64."""
    return math.sqrt(float(np.square(values, dtype=np.float64).sum()))


def _check_k(k: int) -> None:
    if not 1 <= k <= BLOCK:
        raise ValueError(f"k must be from 1 to {BLOCK}, not {k}")
