"""Rows of packed documents: what a forward pass is given.

The one idea: position ids restart at each document, and attention follows them, so documents that
share a row do not see one another. A token's place in the loss is the place that predicts it.

Shape suffixes: B rows, S places of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Self

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Packed rows and the weight of each place in the loss. All tensors are [B, S], on the CPU."""

    token_ids_BS: torch.Tensor
    """int64; 0 where a row has no document."""
    position_ids_BS: torch.Tensor
    """int64, from 0 in each document; 0 where a row has no document."""
    weights_BS: torch.Tensor
    """float32; [b, s] weighs the prediction of token [b, s + 1] from place [b, s]."""

    @property
    def is_real_BS(self) -> torch.Tensor:  # noqa: N802
        """bool; False where a row has no document.

        A document that is token 0 alone is taken for none: nothing is learned from it.
        """
        goes_on_BS = self.position_ids_BS > 0
        begins_BS = goes_on_BS.roll(-1, dims=1)
        begins_BS[:, -1] = False
        return (self.token_ids_BS != 0) | goes_on_BS | begins_BS

    def to_tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in order, as a broadcast needs them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor]) -> Self:
        """The batch whose `to_tensors` gave the tensors."""
        names = [field.name for field in fields(cls)]
        return cls(**dict(zip(names, tensors, strict=True)))

    def split(self, index: int, parts: int) -> Self:
        """Part `index` of `parts`: ceil(B / parts) rows in order, the last ones zero rows.

        Works for ranks and again for micro-batches. Zero rows have weight 0 everywhere.
        """
        rows = -(-self.token_ids_BS.shape[0] // parts)
        return self.from_tensors(
            [_rows(tensor, index * rows, rows) for tensor in self.to_tensors()]
        )


def _rows(tensor: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    held = tensor[start : start + rows]
    return torch.cat([held, held.new_zeros(rows - held.shape[0], *tensor.shape[1:])])


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Tokens that attend to one another, and from which of them on the loss counts."""

    token_ids: Sequence[int] | np.ndarray
    learn_from: int = 0
    """Tokens before this one are only read; token 0 is never predicted."""
    is_learned: Sequence[bool] | np.ndarray | None = None
    """Of each token, whether the loss counts on it; None = on all from learn_from on."""


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fills rows of `capacity`: each item, in order, goes to the first row with room for it.

    Returns the item numbers of each row. Raises ValueError for an item longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a document of {longest} tokens does not fit seq_len {capacity}")
    size = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * size)  # a heap: the most room below each node, rows are its leaves
    rows: list[list[int]] = []
    for item, length in enumerate(lengths):
        node = 1
        while node < size:
            node = 2 * node + (room[2 * node] < length)
        if node - size == len(rows):
            rows.append([])
        rows[node - size].append(item)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def pack(
    documents: Sequence[Document], rows: Sequence[Sequence[int]], seq_len: int
) -> tuple[TokenBatch, list[tuple[int, slice]]]:
    """Lays documents into rows.

    rows: the numbers of the documents of each row, as first_fit gives them.
    Returns the batch, and for each laid document, row by row, its row and the places that predict
    its learned tokens.
    """
    token_ids_BS = np.zeros((len(rows), seq_len), dtype=np.int64)
    position_ids_BS = np.zeros_like(token_ids_BS)
    weights_BS = np.zeros(token_ids_BS.shape, dtype=np.float32)
    learned = []
    for row, items in enumerate(rows):
        start = 0
        for document in (documents[item] for item in items):
            stop = start + len(document.token_ids)
            token_ids_BS[row, start:stop] = document.token_ids
            position_ids_BS[row, start:stop] = np.arange(stop - start)
            places = slice(start + max(document.learn_from, 1) - 1, stop - 1)
            weights_BS[row, places] = 1.0
            if document.is_learned is not None:
                weights_BS[row, start : stop - 1] = document.is_learned[1:]
            learned.append((row, places))
            start = stop
    arrays = (token_ids_BS, position_ids_BS, weights_BS)
    return TokenBatch.from_tensors([torch.from_numpy(array) for array in arrays]), learned


def permutation(num: int, *words: int | str) -> np.ndarray:
    """A random order of range(num), int64 [num], a pure function of (num, words).

    Sorts raw Philox output, whose stream numpy fixes for good; Generator's may change.
    """
    key = int.from_bytes(
        blake2b("/".join(map(str, words)).encode(), digest_size=16).digest(), "little"
    )
    return np.argsort(np.random.Philox(key=key).random_raw(num), kind="stable")
