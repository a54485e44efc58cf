"""Rows of one tensor, coded: what a frame holds many of.

The one idea: a run knows its place in its tensor, its blocks and the model they were coded with, so
that whoever has the old values of those rows can decode it, alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
}
BLOCK_ROWS = 64
"""Blocks are whole bands of this many rows, the last one what is left."""
# a number as str() writes it, so that it comes back the same
NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)")


class WireError(ValueError):
    """A frame that is cut, flipped or forged."""


@dataclass(frozen=True, slots=True)
class Model:
    """How often the elements of each class change, and by which steps."""

    first: int
    """The lowest class; what lies below counts as it."""
    lengths: tuple[int, ...]
    """Index in hazard.LENGTHS, one a class."""
    counts: tuple[int, ...]
    """Changes that the model was made from, one a class."""
    steps: tuple[tuple[int, ...], ...]
    """Frequencies of step symbols out of 4096 (zeros at the end left out), one row a class."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows [row_start, row_start + num_rows) of one tensor, coded in blocks of rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_start: int
    num_rows: int
    codec: str = "dense"
    count: int = 0
    """Elements that the payload codes: the changed ones, or all of a dense run."""
    block_rows: int = BLOCK_ROWS
    block_nbytes: tuple[int, ...] = ()
    payload: bytes | memoryview = b""
    """All blocks; empty where only a frame's head was read."""
    model: Model | None = None

    @property
    def row_elements(self) -> int:
        """Elements in one row; a vector (or a scalar) is one row."""
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)

    @property
    def start(self) -> int:
        """Flat index of the first element in the tensor."""
        return self.row_start * self.row_elements

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.row_elements

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // self.block_rows)

    def coded(
        self, codec: str, count: int, block_rows: int, blocks: list[bytes], model: Model | None
    ) -> Run:
        """The same rows, coded (dataclasses.replace is slow enough for small tensors to feel)."""
        return Run(
            self.name,
            self.dtype,
            self.shape,
            self.row_start,
            self.num_rows,
            codec,
            count,
            block_rows,
            tuple(map(len, blocks)),
            b"".join(blocks),
            model,
        )

    def blocks(self) -> Iterator[tuple[int, int, bytes | memoryview]]:
        """(first element, end, payload) of each block, elements counted in the run."""
        size, taken = self.block_rows * self.row_elements, 0
        for index, nbytes in enumerate(self.block_nbytes):
            stop = min((index + 1) * size, self.num_elements)
            yield index * size, stop, self.payload[taken : taken + nbytes]
            taken += nbytes


def name_numbers(name: str) -> tuple[int, ...]:
    """The numbers in a name."""
    return tuple(map(int, NUMBER.findall(name)))


def name_pieces(name: str) -> tuple[str, ...]:
    """The pieces of text around a name's numbers: what a family's names share."""
    return tuple(NUMBER.split(name)[::2])


def tensor_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor; a vector or a scalar is one row."""
    return shape[0] if len(shape) > 1 else 1


def uncovered(runs: list[Run]) -> str | None:
    """What keeps `runs` from holding every row of their tensors exactly once, or None."""
    stops: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.name, run.row_start)):
        last = stops.get(run.name)
        stop = last.row_start + last.num_rows if last else 0
        if run.row_start != stop:
            return f"{run.name} has rows up to {stop}, then rows from {run.row_start}"
        stops[run.name] = run
    for run in stops.values():
        stop, rows = run.row_start + run.num_rows, tensor_rows(run.shape)
        if stop != rows:
            return f"{run.name} has rows up to {stop} of {rows}"
    return None


def overlap(runs: list[Run]) -> str | None:
    """What makes `runs` hold a row twice, or None."""
    stops: dict[str, int] = {}
    for run in sorted(runs, key=lambda run: (run.name, run.row_start)):
        stop = stops.get(run.name, 0)
        if run.row_start < stop:
            return f"{run.name} has rows up to {stop}, then rows from {run.row_start}"
        stops[run.name] = run.row_start + run.num_rows
    return None
