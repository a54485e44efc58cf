"""Exact top-k over sharded scores, without a gather.

The one idea: non-negative float32 numbers sort like their bit patterns, so three all-reduced
histograms of 11, 10 and 10 bits find the k-th greatest score to the bit; scores equal to it are
taken in the order of (name, flat index), for which one all-reduced count a band is enough. So the
answer is that of a stable sort on one process, whoever owns which rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gossamer.comm.state_hash import MASK_64, MIX_1, MIX_2, SPREAD, hash_elements, tensor_seed
from gossamer.trainer.sparsity.method import Band, Reduce
from torch import Tensor

DIGITS = ((20, 11), (10, 10), (0, 10))
"""(shift, bits) of the passes over a 31-bit key."""
POOLS_AT_ONCE = 512
"""Bounds a histogram to 8 MiB."""
CACHED_KEYS = 1 << 25
"""Keys of a call that are kept between its passes, 128 MiB; the others are computed again."""
INFINITY_KEY = 0x7F800000


@dataclass(slots=True)
class Piece:
    """What a rank holds of a pool."""

    pool: int
    slot: int
    """Its place among all pieces of all ranks; those of one pool lie together, in order."""
    keys: Callable[[], Tensor]
    """int32, any shape; -1 is no candidate. Asked once a pass, so that not all need be kept."""


def score_keys(score: Tensor, where: str) -> Tensor:
    """Non-negative scores as int32 keys of the same order. Raises ValueError for NaN."""
    keys = score.to(torch.float32).abs().view(torch.int32)
    if keys.numel() and int(keys.max()) > INFINITY_KEY:
        raise ValueError(f"{where}: a score is NaN; expected numbers")
    return keys


def uniform(name: str, first: int, count: int, draw: str) -> Tensor:
    """float32 in [0, 1), 24 bits each, for elements `first`, ... of tensor `name`; however it is
    cut, the same. `draw` names the occasion."""
    index = torch.arange(first, first + count, dtype=torch.int64)
    word = _mixed(index * _signed(SPREAD) + _signed(tensor_seed(name, draw, ())))
    return _shifted(word, 40).to(torch.float32) * 2.0**-24


def _signed(word: int) -> int:
    word &= MASK_64
    return word - (1 << 64) if word >> 63 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(word: Tensor) -> Tensor:
    """The splitmix64 finaliser; int64 products wrap."""
    word = (word ^ _shifted(word, 31)) * _signed(MIX_1)
    word = (word ^ _shifted(word, 31)) * _signed(MIX_2)
    return word ^ _shifted(word, 31)


def select(
    pieces: Sequence[Piece], keep_P: Tensor, slots_P: Tensor, reduce: Reduce
) -> list[Tensor]:
    """The keep_P[p] greatest keys of each pool p: bool, one tensor a piece. A collective call.

    slots_P: slots of each pool, of all ranks; pool p's come after those of the pools before it.
    Raises ValueError where a pool has fewer candidates than are to be kept.
    """
    chosen: list[Tensor | None] = [None] * len(pieces)
    first_P = slots_P.cumsum(0) - slots_P
    for low in range(0, len(keep_P), POOLS_AT_ONCE):
        high = min(low + POOLS_AT_ONCE, len(keep_P))
        mine = [i for i, piece in enumerate(pieces) if low <= piece.pool < high]
        found = _select(
            [pieces[i] for i in mine],
            keep_P[low:high],
            slots_P[low:high],
            int(first_P[low]),
            reduce,
            low,
        )
        for i, mask in zip(mine, found, strict=True):
            chosen[i] = mask
    return chosen  # type: ignore[return-value]


def _select(
    pieces: list[Piece], keep_P: Tensor, slots_P: Tensor, first_slot: int, reduce: Reduce, low: int
) -> list[Tensor]:
    """select() of pools low, ..., whose first slot is first_slot."""
    pieces = list(_cached(pieces))
    threshold_P, ties_P, equal_P = _thresholds(pieces, keep_P, reduce, low)
    before = torch.zeros(int(slots_P.sum()), dtype=torch.int64)
    if bool((ties_P < equal_P).any()):  # of equal keys only the first are taken
        for piece in pieces:
            before[piece.slot - first_slot] = int(
                (piece.keys() == threshold_P[piece.pool - low]).sum()
            )
        reduce(before)
        before = before.cumsum(0) - before
        starts_P = slots_P.cumsum(0) - slots_P
        pool_of = torch.repeat_interleave(torch.arange(len(slots_P)), slots_P)
        before -= before[starts_P.clamp(max=max(len(before) - 1, 0))][pool_of]
    found = []
    for piece in pieces:
        keys, pool = piece.keys(), piece.pool - low
        mask, ties = keys > threshold_P[pool], int(ties_P[pool])
        if ties:
            equal = keys == threshold_P[pool]
            left = ties - int(before[piece.slot - first_slot])
            mask |= equal & (equal.flatten().cumsum(0).view(keys.shape) <= left)
        found.append(mask)
    return found


def _cached(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The same, with keys at hand for as many as CACHED_KEYS allows."""
    left = CACHED_KEYS
    for piece in pieces:
        if left > 0:
            keys = piece.keys()
            left -= keys.numel()
            yield Piece(piece.pool, piece.slot, partial(torch.Tensor.detach, keys))
        else:
            yield piece


def _thresholds(
    pieces: list[Piece], keep_P: Tensor, reduce: Reduce, low: int
) -> tuple[Tensor, Tensor, Tensor]:
    """([P] the keep-th greatest key, [P] how many equal to it are kept, [P] how many there are)."""
    left_P, prefix_P = keep_P.clone(), torch.zeros_like(keep_P)
    rest: list[Tensor | None] = [None] * len(pieces)
    for shift, bits in DIGITS:
        bins, is_first = 1 << bits, shift == DIGITS[0][0]
        count_PB = torch.zeros(len(keep_P), bins, dtype=torch.int64)
        for i, piece in enumerate(pieces):
            pool, known = piece.pool - low, rest[i]
            keys = piece.keys().flatten() if known is None else known
            if not is_first:
                keys = rest[i] = keys[(keys >> shift >> bits) == prefix_P[pool]]
            digits = keys >> shift if is_first else (keys >> shift) & (bins - 1)
            counted = torch.bincount(digits + 1, minlength=bins + 1)[1:]  # -1 is no candidate
            count_PB[pool] += counted.to(count_PB.device)
        reduce(count_PB)
        at_least_PB = count_PB.flip(1).cumsum(1).flip(1)
        digit_P = (at_least_PB >= left_P[:, None]).sum(1) - 1
        if bool((digit_P < 0).any()):
            pool = int((digit_P < 0).nonzero()[0])
            raise ValueError(
                f"pool {pool + low} has {int(at_least_PB[pool, 0])} candidates;"
                f" expected at least the {int(keep_P[pool])} that are to be kept"
            )
        equal_P = count_PB.gather(1, digit_P[:, None])[:, 0]
        left_P -= at_least_PB.gather(1, digit_P[:, None])[:, 0] - equal_P
        prefix_P = (prefix_P << bits) | digit_P
    return prefix_P, left_P, equal_P


def mask_hash(bands: Sequence[Band]) -> int:
    """Hash of the masks' bits, mod 2**64; of the hashes of all rows, however cut, the sum."""
    total = 0
    for band in bands:
        seed = tensor_seed(band.name, "mask", band.shape)
        seed += band.row_start * band.mask_RC.shape[1] * SPREAD
        total += hash_elements(band.mask_RC.flatten().to(torch.uint8).cpu().numpy(), seed & MASK_64)
    return total & MASK_64
