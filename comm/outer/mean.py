"""The mean of a round's messages, for the rows that one rank holds.

The one idea: messages are added up one after the other in the order of the round's record, products
rounded before they are added, so every rank that reads the same messages gets the same bits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.message import Sent
from torch import Tensor, from_numpy


def median_factors(messages: Sequence[Sequence[Sent]], most: float) -> list[list[float]]:
    """A factor for all that each message holds: at most 1, bringing it down to `most` times the
    median norm; 0 leaves all as they are.

    The median is over the messages that hold the same rows; of two it is the lower one, for the
    greater is the one to be doubted.
    """
    if not most:
        return [[1.0] * len(message) for message in messages]
    norms: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for message in messages:
        for sent in message:
            norms[_rows_of(sent)].append(sent.norm)
    limit = {rows: most * sorted(each)[(len(each) - 1) // 2] for rows, each in norms.items()}
    return [
        [min(1.0, limit[_rows_of(sent)] / sent.norm) if sent.norm else 1.0 for sent in message]
        for message in messages
    ]


def mean_of(pieces: Sequence[tuple[Sent, float]], rows: Rows, divisor: int | None) -> Tensor:
    """The mean of `pieces` of their tensor, each with its factor; 0 where none has an element.

    A `divisor` divides every element (aggregation `replicas`); without one an element is divided by
    the number of pieces that hold it (`senders`). Pieces may be cut elsewhere than the rows.
    """
    first, size = first_of(rows), rows.values.numel()
    total, holders = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for sent, factor in pieces:
        if (met := meet(sent, first, size)) is not None:
            places, values = met
            total[places] += values if factor == 1 else values * np.float32(factor)
            holders[places] += 1
    total /= np.float32(divisor) if divisor else np.maximum(holders, 1)
    return from_numpy(total).view(rows.values.shape)


def first_of(rows: Rows) -> int:
    """Flat index of the first element in the tensor."""
    return rows.row_start * math.prod(rows.shape[1:])


def _rows_of(sent: Sent) -> tuple[str, int, int]:
    return sent.run.name, sent.run.row_start, sent.run.num_rows


def meet(sent: Sent, first: int, size: int) -> tuple[slice | np.ndarray, np.ndarray] | None:
    """(places, values) of what is sent of elements [first, first + size) of its tensor, places
    counted from `first`; None where its rows are others."""
    shift = sent.run.start - first
    if not -sent.run.num_elements < shift < size:
        return None
    if sent.positions is None:
        start, stop = max(shift, 0), min(shift + sent.run.num_elements, size)
        return slice(start, stop), sent.values[start - shift : stop - shift]
    places = sent.positions.astype(np.int64) + shift
    inside = (places >= 0) & (places < size)
    return places[inside], sent.values[inside]
