"""What an engine computes with, and where in it the elements of a checkpoint tensor lie.

The one idea: whatever a loader does by moving (fusing, stacking, slicing, blocking for a kernel)
leaves each element at an offset of its row plus an offset of its column; two small tables are the
map, both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from gossamer.comm.codec.kernels import compiled
from torch import Tensor

Load = Callable[[list[tuple[str, Tensor]]], object]


class LayoutError(RuntimeError):
    """An engine whose weights cannot be followed."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns: the last axis and all before it."""
        return math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1


@dataclass(frozen=True, slots=True)
class Packed:
    """Run-time tensors that the engine packs together once they are loaded."""

    load_shapes: dict[str, tuple[int, ...]]
    """By name: the shape that the loader fills."""
    pack: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Loaded tensors to run-time ones, by name; leaves its arguments and the engine alone."""

    def within(self, prefix: str) -> Packed:
        """The same with names of a whole model, where this one's are those inside of a module."""

        def pack(loaded: dict[str, Tensor]) -> dict[str, Tensor]:
            inside = {name.removeprefix(prefix + "."): each for name, each in loaded.items()}
            return {f"{prefix}.{name}": each for name, each in self.pack(inside).items()}

        return Packed({f"{prefix}.{name}": s for name, s in self.load_shapes.items()}, pack)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the engine of one rank computes with."""

    tensors: dict[str, Tensor]
    """Parameters and buffers by name; learning swaps their storage for a while."""
    load: Load
    """The model's load_weights: writes checkpoint tensors into run-time ones."""
    packed: list[Packed] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    """Tensors that the engine changes after loading in a way that cannot be repeated."""

    def addresses(self) -> dict[str, int]:
        """Where in memory each tensor is."""
        return {name: tensor.data_ptr() for name, tensor in self.tensors.items()}

    def check_addresses(self, before: dict[str, int]) -> None:
        """Raises LayoutError unless all are where they were: views and mirrors write there."""
        for name, address in self.addresses().items():
            if before[name] != address:
                raise LayoutError(f"run-time tensor {name} is not where it was at the start")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Element (row, column) lies at `offset + rows[row] + columns[column]` of `held_by`.

    -1 in a table: not in this piece.
    """

    held_by: str
    offset: int
    rows: np.ndarray
    columns: np.ndarray

    def write(
        self, held: np.ndarray, positions: np.ndarray, start: int, patterns: np.ndarray
    ) -> None:
        """Puts `patterns` of elements start + `positions` into the flat bits of `held_by`."""
        _write(held, positions, start, patterns, self.offset, self.rows, self.columns)

    def read(self, held: np.ndarray, positions: np.ndarray, start: int, into: np.ndarray) -> None:
        """The other way; elements that are not in this piece are left as they are."""
        _read(held, positions, start, into, self.offset, self.rows, self.columns)

    def find(self, flat: np.ndarray) -> tuple[np.ndarray | slice, np.ndarray]:
        """Which of the flat indices `flat` are here, and where they lie."""
        row, column = np.divmod(flat, len(self.columns))
        row, column = self.rows[row], self.columns[column]
        places = row + column
        places += self.offset
        absent = (row | column) < 0
        if not absent.any():
            return slice(None), places
        here = np.flatnonzero(~absent)
        return here, places[here]

    def is_whole(self) -> bool:
        """True when the piece is the whole tensor, in its own order."""
        width = len(self.columns)
        return np.array_equal(self.columns, np.arange(width)) and np.array_equal(
            self.rows, np.arange(len(self.rows)) * width
        )


@compiled
def _write(held, positions, start, patterns, offset, rows, columns):  # noqa: ANN001, ANN202
    for i in range(len(positions)):
        flat = start + positions[i]
        row, column = rows[flat // len(columns)], columns[flat % len(columns)]
        if row >= 0 and column >= 0:
            held[offset + row + column] = patterns[i]


@compiled
def _read(held, positions, start, into, offset, rows, columns):  # noqa: ANN001, ANN202
    for i in range(len(positions)):
        flat = start + positions[i]
        row, column = rows[flat // len(columns)], columns[flat % len(columns)]
        if row >= 0 and column >= 0:
            into[i] = held[offset + row + column]
