"""One part of a version: rows of tensors, coded against the bytes they had in the last version.

The one idea: the encoder keeps the old bit patterns of its rows, and they move only when told that
the version exists. Changes are found once per run and serve the delta, the hash and the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from gossamer.comm.codec.bits import dtype_name, tensor_bits
from gossamer.comm.codec.runs import RunCodec, split_rows
from gossamer.comm.state_hash import hash_change, hash_elements
from gossamer.comm.wire import DTYPE_BYTES, Run


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [row_start, row_start + n) of a tensor, as they are to be published."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    row_start: int
    values: torch.Tensor
    """[n, *shape[1:]] in the publish dtype, CPU, contiguous; a vector whole, [shape[0]]."""


@dataclass(slots=True)
class EncodedPart:
    """Runs of one part, in the order of its rows."""

    delta: list[Run] = field(default_factory=list)
    """Runs that changed, if a delta was asked for."""
    anchor: list[Run] = field(default_factory=list)
    """All runs, if an anchor was asked for."""
    num_changed: int = 0
    """All elements where no delta was asked for."""
    num_elements: int = 0
    full_bytes: int = 0
    updates: list[tuple[Run, np.ndarray | None, np.ndarray]] = field(default_factory=list)
    """What the base gains: run, positions (None: all), new bit patterns."""


class PartEncoder:
    """Keeps the base of one part: flat bit patterns by tensor and first row."""

    def __init__(self, zstd_level: int) -> None:
        self._codec = RunCodec(zstd_level)
        self._base: dict[tuple[str, int, str, tuple[int, ...]], np.ndarray] = {}

    def encode(self, rows: Iterable[Rows], with_delta: bool, with_anchor: bool) -> EncodedPart:
        """Codes `rows` against the base, which stays as it is.

        Without a delta every element counts as changed. Raises ValueError for rows that do not
        fit their tensor, or that are not those of the base where a delta is asked for.
        """
        part = EncodedPart()
        unseen = set(self._base)
        for each in rows:
            for run, new in _runs_of(each):
                unseen.discard(_key(run))
                part.num_elements += len(new)
                part.full_bytes += new.nbytes
                if with_anchor:
                    blocks = self._codec.encode_dense(run, new)
                    hash_sum = hash_elements(new, run.start)
                    part.anchor.append(replace(run, blocks=blocks, hash_sum=hash_sum))
                if with_delta:
                    self._encode_delta(part, run, new)
                else:
                    part.num_changed += len(new)
                    part.updates.append((run, None, new.copy()))
        if unseen:
            name, row_start, *_ = min(unseen)
            raise ValueError(f"rows of {name} from {row_start} on were published before, not now")
        return part

    def move_base(self, part: EncodedPart) -> None:
        """Makes `part` the base of the next one."""
        for run, positions, new in part.updates:
            if positions is None:
                self._base[_key(run)] = new
            else:
                self._base[_key(run)][positions] = new

    def _encode_delta(self, part: EncodedPart, run: Run, new: np.ndarray) -> None:
        old = self._base.get(_key(run))
        if old is None or len(old) != len(new):
            raise ValueError(
                f"{run.num_rows} rows of {run.name} from {run.row_start} on were not published "
                f"as {run.dtype} of {run.shape} before"
            )
        positions = np.flatnonzero(old != new)
        if len(positions) == 0:
            return
        before, after = old[positions], new[positions]
        hash_sum = hash_change(positions, before, after, run.start)
        blocks = self._codec.encode_changes(run, old, new, positions)
        part.delta.append(replace(run, blocks=blocks, hash_sum=hash_sum))
        part.num_changed += len(positions)
        part.updates.append((run, positions, after))


def _key(run: Run) -> tuple[str, int, str, tuple[int, ...]]:
    return run.name, run.row_start, run.dtype, run.shape


def _runs_of(rows: Rows) -> Iterator[tuple[Run, np.ndarray]]:
    """Runs of bounded size, without blocks as yet, and their bit patterns (views)."""
    shape, values = tuple(rows.shape), rows.values
    dtype = dtype_name(values.dtype)
    is_vector = len(shape) < 2
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{rows.name}: dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype}")
    if 0 in (*shape, *values.shape):
        raise ValueError(f"{rows.name}: shape {shape} holds no element")
    if is_vector:
        fits = values.shape == shape and rows.row_start == 0
    else:
        fits = values.shape[1:] == shape[1:] and 0 <= rows.row_start <= shape[0] - len(values)
    if not fits:
        raise ValueError(
            f"{rows.name}: values {tuple(values.shape)} from row {rows.row_start} on "
            f"are not rows of {shape}"
        )
    try:
        patterns = tensor_bits(values)
    except ValueError as error:
        raise ValueError(f"{rows.name}: {error}") from error
    num_rows = 1 if is_vector else len(values)
    row_elements = len(patterns) // num_rows
    for first, stop in split_rows(num_rows, row_elements):
        run = Run(rows.name, dtype, shape, rows.row_start + first, stop - first, 0, [])
        yield run, patterns[first * row_elements : stop * row_elements]
