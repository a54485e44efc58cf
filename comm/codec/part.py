"""One part of a version: rows of tensors, coded against the bytes they had in the last version.

The one idea: the encoder keeps the old bit patterns of its rows, and they move only when told that
the version exists. Changes are found in one pass over the rows, which are then not needed any more;
models and codecs are chosen with all changes known, and a second pass over the base codes them.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import local

import numpy as np
import torch
from gossamer.comm.codec import build_codec
from gossamer.comm.codec.bits import dtype_name, find_changed, tensor_bits
from gossamer.comm.codec.ladder import Choice, choose
from gossamer.comm.codec.model import (
    Counts,
    assign_models,
    count_changes,
    count_elements,
    entry_bits,
)
from gossamer.comm.device import (
    find_changed_on_device,
    integer_view,
    is_on_device,
    write_on_device,
)
from gossamer.comm.run import BLOCK_ROWS, DTYPE_BYTES, Model, Run
from gossamer.comm.state_hash import MASK_64, hash_change, hash_elements, run_seed

# a block of a delta holds about this many changes, so that its end costs little
MIN_BLOCK_CHANGES = 512
DENSE_BLOCK_ELEMENTS = 1 << 20
MAX_RUN_ELEMENTS = 1 << 26

Key = tuple[str, int, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [row_start, row_start + n) of a tensor, as they are to be published."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    row_start: int
    values: torch.Tensor
    """[n, *shape[1:]] in the publish dtype, contiguous; a vector whole, [shape[0]]."""


@dataclass(slots=True)
class EncodedPart:
    """Runs of one part."""

    delta: list[Run] = field(default_factory=list)
    """Runs that changed, if a delta was asked for."""
    anchor: list[Run] = field(default_factory=list)
    """All runs, if an anchor was asked for."""
    delta_gain: int = 0
    """What the delta adds to the hash of the state, mod 2**64."""
    anchor_gain: int = 0
    num_changed: int = 0
    """All elements where no delta was asked for."""
    num_elements: int = 0
    full_bytes: int = 0
    num_empty: int = 0
    """Runs of which nothing changed."""
    bytes_by_codec: Counter[str] = field(default_factory=Counter)
    runs_by_choice: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Runs by (codec, why it was chosen)."""
    find_s: float = 0.0
    """Of the first pass: waiting for rows, finding and hashing changes, coding an anchor."""
    updates: list[_Change] = field(default_factory=list)
    """What the base gains."""


@dataclass(slots=True)
class _Change:
    """New bit patterns of a run at `positions` (None: all)."""

    run: Run
    positions: np.ndarray | None
    after: np.ndarray
    counts: Counts | None = None
    hash_gain: int = 0
    on_device: torch.Tensor | None = None
    """`after`, where the rows lie on a device."""


@dataclass(slots=True)
class _Base:
    """What a run was in the last version."""

    bits: np.ndarray
    elements: np.ndarray
    """Old values by class."""
    dense_nbytes: int
    """Of the run when it was last sent whole."""
    on_device: torch.Tensor | None = None
    """The same bits where the rows lie, to compare there."""


class PartEncoder:
    """Keeps the base of one part: flat bit patterns by tensor and first row."""

    def __init__(
        self, zstd_level: int = 1, link_mbit: float | None = None, num_threads: int = 1
    ) -> None:
        self._zstd_level = zstd_level
        self._link_mbit = link_mbit
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self._ahead = 2 * num_threads
        self._codecs = local()
        self._base: dict[Key, _Base] = {}

    def encode(self, rows: Iterable[Rows], with_delta: bool, with_anchor: bool) -> EncodedPart:
        """Codes `rows` against the base, which stays as it is.

        Without a delta every element counts as changed. Raises ValueError for rows that do not
        fit their tensor, or that are not those of the base where a delta is asked for.
        """
        part, started_s = EncodedPart(), time.perf_counter()
        unseen = set(self._base)

        def look(each: tuple[Run, torch.Tensor]) -> tuple[tuple[Run, int] | None, _Change | None]:
            run, values = each
            anchor = None
            if with_anchor or not with_delta:
                new = tensor_bits(values.cpu())
            if with_anchor:
                anchor = self._dense(run, new), hash_elements(new, run_seed(run))
            if with_delta:
                return anchor, self._find(run, values)
            on_device = integer_view(values).clone() if is_on_device(values) else None
            return anchor, _Change(run, None, new.copy(), on_device=on_device)

        runs = (each for one in rows for each in _runs_of(one))
        for (run, values), (anchor, change) in self._in_order(look, runs):
            unseen.discard(_key(run))
            part.num_elements += run.num_elements
            part.full_bytes += values.nbytes
            if anchor is not None:
                part.anchor.append(anchor[0])
                part.anchor_gain += anchor[1]
            if change is None:
                part.num_empty += 1
            else:
                part.updates.append(change)
                part.num_changed += len(change.after)
        if unseen:
            name, row_start, *_ = min(unseen)
            raise ValueError(f"rows of {name} from {row_start} on were published before, not now")
        part.find_s = time.perf_counter() - started_s
        if with_delta:
            self._encode_delta(part)
        part.anchor_gain &= MASK_64
        return part

    def forget(self) -> None:
        """Drops the base: what comes next may be other rows."""
        self._base.clear()

    def move_base(self, part: EncodedPart) -> None:
        """Makes `part` the base of the next one."""
        sizes = {_key(run): len(run.payload) for run in (*part.anchor, *part.delta)
                 if run.codec == "dense"}  # fmt: skip
        for change in part.updates:
            key, dtype = _key(change.run), change.run.dtype
            base = self._base.get(key)
            if base is None or change.positions is None:
                elements = count_elements(change.after, dtype)
                dense_nbytes = sizes.get(key, change.after.nbytes)
                self._base[key] = _Base(change.after, elements, dense_nbytes, change.on_device)
                continue
            assert change.counts is not None
            base.elements += count_elements(change.after, dtype)
            base.elements -= change.counts.changed()
            base.bits[change.positions] = change.after
            base.dense_nbytes = sizes.get(key, base.dense_nbytes)
            if base.on_device is not None:
                write_on_device(base.on_device, change.positions, change.after)

    def _find(self, run: Run, values: torch.Tensor) -> _Change | None:
        """What of a run changed, None where nothing did."""
        base = self._base.get(_key(run))
        if base is None or len(base.bits) != values.numel():
            raise ValueError(
                f"{run.num_rows} rows of {run.name} from {run.row_start} on were not published "
                f"as {run.dtype} of {run.shape} before"
            )
        if base.on_device is None:
            positions, before, after = find_changed(base.bits, tensor_bits(values.cpu()))
        else:
            found = find_changed_on_device(base.on_device, integer_view(values))
            positions, before, after = found
        if len(positions) == 0:
            return None
        counts = count_changes(base.elements, before, after, run.dtype)
        gain = hash_change(run_seed(run), positions, before, after)
        return _Change(run, positions, after, counts, gain)

    def _encode_delta(self, part: EncodedPart) -> None:
        """Codes what was found, by codecs and models chosen over all of it."""
        choices = [self._choose(change) for change in part.updates]
        models = self._assign(part.updates, choices)
        work = zip(part.updates, choices, models, strict=True)
        for (change, choice, _), run in self._in_order(self._code, work):
            part.delta.append(run)
            part.delta_gain = (part.delta_gain + change.hash_gain) & MASK_64
            part.bytes_by_codec[run.codec] += len(run.payload)
            part.runs_by_choice[run.codec, choice.why] += 1

    def _choose(self, change: _Change) -> Choice:
        assert change.counts is not None
        base = self._base[_key(change.run)]
        return choose(change.counts, base.dense_nbytes, self._link_mbit)

    def _assign(self, changes: list[_Change], choices: list[Choice]) -> list[Model | None]:
        """A model for each run to be coded by entropy; where models cost too much, `choices`
        become dense."""
        coded = [i for i, choice in enumerate(choices) if choice.codec == "entropy"]
        known = ((changes[i].run, changes[i].counts) for i in coded)
        found = assign_models([(run, counts) for run, counts in known if counts is not None])
        members: dict[Model, list[int]] = defaultdict(list)
        models: list[Model | None] = [None] * len(changes)
        for i, model in zip(coded, found, strict=True):
            members[model].append(i)
            models[i] = model
        for model, of_model in members.items():
            entropy, dense = (
                sum(choices[i].nbytes[codec] for i in of_model) for codec in ("entropy", "dense")
            )
            if entropy + entry_bits(model) / 8 > dense:
                for i in of_model:
                    choices[i] = replace(choices[i], codec="dense", why="smaller than its model")
        return models

    def _code(self, work: tuple[_Change, Choice, Model | None]) -> Run:
        change, choice, model = work
        run, old, count = change.run, self._base[_key(change.run)].bits, len(change.after)
        if choice.codec == "dense":
            new = old.copy()
            new[change.positions] = change.after
            return self._dense(run, new)
        rows = MIN_BLOCK_CHANGES * run.num_rows // (count * BLOCK_ROWS) * BLOCK_ROWS
        rows = max(BLOCK_ROWS, min(rows, _bands(run.num_rows)))
        run = run.coded(choice.codec, count, rows, [], model)
        blocks = self._codec(run.codec).encode(run, old, change.positions, change.after)
        return run.coded(choice.codec, count, rows, blocks, model)

    def _dense(self, run: Run, new: np.ndarray) -> Run:
        """The run with all its elements."""
        rows = max(1, DENSE_BLOCK_ELEMENTS // (run.row_elements * BLOCK_ROWS)) * BLOCK_ROWS
        rows = min(rows, _bands(run.num_rows))
        run = run.coded("dense", len(new), rows, [], None)
        blocks = self._codec("dense").encode(run, new, None, new)
        return run.coded("dense", len(new), rows, blocks, None)

    def _codec(self, name: str):  # noqa: ANN202
        """The calling thread's own."""
        if not hasattr(self._codecs, name):
            setattr(self._codecs, name, build_codec(name, self._zstd_level))
        return getattr(self._codecs, name)

    def _in_order(self, work, items):  # noqa: ANN001, ANN202
        """(item, work(item)) in order, some items ahead in threads."""
        if self._pool is None:
            yield from ((item, work(item)) for item in items)
            return
        waiting: list[tuple[object, Future]] = []
        for item in items:
            waiting.append((item, self._pool.submit(work, item)))
            if len(waiting) > self._ahead:
                first, future = waiting.pop(0)
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _key(run: Run) -> Key:
    return run.name, run.row_start, run.dtype, run.shape


def _bands(num_rows: int) -> int:
    """`num_rows` as whole bands."""
    return -(-num_rows // BLOCK_ROWS) * BLOCK_ROWS


def _runs_of(rows: Rows) -> Iterator[tuple[Run, torch.Tensor]]:
    """Runs of bounded size, without blocks as yet, and their flat values (views)."""
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
        integer_view(values)
    except ValueError as error:
        raise ValueError(f"{rows.name}: {error}") from error
    num_rows = 1 if is_vector else len(values)
    flat = values.detach().reshape(-1)
    row_elements = len(flat) // num_rows
    most = max(1, MAX_RUN_ELEMENTS // (row_elements * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, num_rows, most):
        stop = min(first + most, num_rows)
        run = Run(rows.name, dtype, shape, rows.row_start + first, stop - first)
        yield run, flat[first * row_elements : stop * row_elements]
