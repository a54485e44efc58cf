"""From what changed to the model that codes it.

The one idea: a model costs bytes, so runs of one family (a matrix of all layers and experts) share
one, and a run gets its own only where that saves more than it costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
from gossamer.comm.codec.elements import class_of_prefix, element_shape, num_classes
from gossamer.comm.codec.hazard import LENGTHS, OCTAVE_BITS, length_codes
from gossamer.comm.codec.kernels import (
    DIRECT_STEPS,
    NUM_STEP_SYMBOLS,
    STEP_BITS,
    class_range,
    count_prefixes,
    count_steps,
    least_bits,
)
from gossamer.comm.run import Model, Run, name_pieces

# classes that hold less than this share of the changes from below are taken together
MERGED_SHARE = 1 / 128
# with fewer a run's own model never pays
MIN_OWN_CHANGES = 8192


@dataclass(frozen=True, slots=True)
class Counts:
    """What a model is made from; those of several runs add up."""

    elements: np.ndarray
    """Old values, int64 [class]."""
    first: int
    """The lowest class that `steps` tells of."""
    steps: np.ndarray
    """Changes, int64 [class - first, step symbol]; other classes have none."""

    def __add__(self, other: Counts) -> Counts:
        first = min(self.first, other.first)
        stop = max(each.first + len(each.steps) for each in (self, other))
        steps = np.zeros((stop - first, NUM_STEP_SYMBOLS), np.int64)
        for each in (self, other):
            steps[each.first - first :][: len(each.steps)] += each.steps
        return Counts(self.elements + other.elements, first, steps)

    def changed(self) -> np.ndarray:
        """Changes, int64 [class]."""
        changed = np.zeros(len(self.elements), np.int64)
        changed[self.first : self.first + len(self.steps)] = self.steps.sum(axis=1)
        return changed


def count_elements(old: np.ndarray, dtype: str) -> np.ndarray:
    """Old values in each class, int64 [class]."""
    prefixes = np.zeros(len(class_of_prefix(dtype)), np.int64)
    count_prefixes(old, element_shape(dtype)[0], prefixes)
    return np.bincount(class_of_prefix(dtype), prefixes, num_classes(dtype)).astype(np.int64)


def count_changes(
    elements: np.ndarray, before: np.ndarray, after: np.ndarray, dtype: str
) -> Counts:
    """Counts of at least one change `before` -> `after` among old values `elements`, [class]."""
    shift, classes = element_shape(dtype)[0], class_of_prefix(dtype)
    first, last = class_range(before, shift, classes)
    steps = np.zeros((last + 1 - first, NUM_STEP_SYMBOLS), np.int64)
    count_steps(before, after, *element_shape(dtype), classes, first, steps)
    return Counts(elements, first, steps)


def build_model(counts: Counts) -> Model:
    """The model that codes changes like these in the fewest bits, its table entry kept short."""
    changed = counts.changed()
    below = np.cumsum(changed)
    last = int(np.flatnonzero(changed)[-1])
    first = int(np.searchsorted(below, below[-1] * MERGED_SHARE, "right"))
    first = min(first, last)
    elements, steps = _merged(counts, first, last + 1)
    changed = steps.sum(axis=1)
    return Model(
        first=first,
        lengths=tuple(length_codes(changed, elements).tolist()),
        counts=tuple(changed.tolist()),
        steps=_frequencies(steps),
    )


def coded_bits(counts: Counts, model: Model) -> float:
    """Bits that `model` needs for `counts`; infinite where it cannot code them."""
    stop = model.first + len(model.counts)
    if counts.steps[max(stop - counts.first, 0) :].any():
        return np.inf
    elements, steps = _merged(counts, model.first, stop)
    changed = steps.sum(axis=1)
    where = (elements - changed) @ _bits_kept(model) + changed @ _bits_changed(model)
    some = steps > 0
    which = steps[some] @ _bits_of_steps(model)[some]
    return float(where + which)


def _merged(counts: Counts, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Old values and changes of classes [first, stop), lower ones counted as the first."""
    elements = counts.elements[first:stop].copy()
    elements[0] += counts.elements[:first].sum()
    steps = np.zeros((stop - first, NUM_STEP_SYMBOLS), np.int64)
    below = min(max(first - counts.first, 0), len(counts.steps))
    steps[0] = counts.steps[:below].sum(axis=0)
    rest = counts.steps[below : max(stop - counts.first, 0)]
    at = counts.first + below - first
    steps[at : at + len(rest)] += rest
    return elements, steps


@lru_cache
def _bits_kept(model: Model) -> np.ndarray:
    return LENGTHS[list(model.lengths)] / 2.0**OCTAVE_BITS


def _bits_changed(model: Model) -> np.ndarray:
    p = 1 - 2.0 ** -_bits_kept(model)
    return -np.log2(np.where(p > 0, p, 1))


@lru_cache
def _bits_of_steps(model: Model) -> np.ndarray:
    """Bits of each step symbol with its extra bits, [class, step symbol]."""
    frequencies = np.zeros((len(model.steps), NUM_STEP_SYMBOLS))
    for row, entries in zip(frequencies, model.steps, strict=True):
        row[: len(entries)] = entries
    extra = np.maximum(np.arange(NUM_STEP_SYMBOLS) - DIRECT_STEPS, 0)
    with np.errstate(divide="ignore"):
        return STEP_BITS - np.log2(frequencies) + extra


def entry_bits(model: Model) -> float:
    """About what a model costs in the frame's table."""
    return 8 * (12 + sum(3 + 1.4 * len(row) for row in model.steps))


def assign_models(runs: list[tuple[Run, Counts]]) -> list[Model]:
    """The model that each run is to be coded with.

    All runs of a dtype begin with one model. A family (names that differ in numbers) leaves it, and
    a run of many changes leaves its family's, where that saves more than the table entry costs.
    """
    families: dict[tuple, list[int]] = defaultdict(list)
    for index, (run, _) in enumerate(runs):
        families[run.dtype, name_pieces(run.name)].append(index)
    sums = {key: _sum(runs[index][1] for index in members) for key, members in families.items()}
    shared = {}
    for dtype in {key[0] for key in families}:
        shared[dtype] = build_model(_sum(each for key, each in sums.items() if key[0] == dtype))
    models: dict[int, Model] = {}
    for key, members in families.items():
        best = _cheaper(sums[key], shared[key[0]])
        for index in members:
            counts = runs[index][1]
            alone = len(members) > 1 and counts.steps.sum() >= MIN_OWN_CHANGES
            models[index] = _cheaper(counts, best) if alone else best
    return [models[index] for index in range(len(runs))]


def _sum(counts: Iterable[Counts]) -> Counts:
    return reduce(Counts.__add__, counts)


def _cheaper(counts: Counts, shared: Model) -> Model:
    """A model of its own for `counts`, or `shared` where that saves too little."""
    bits = coded_bits(counts, shared)
    least = least_bits(counts.elements, counts.first, counts.steps)
    if bits - least < entry_bits(shared) / 2:  # its own would hardly be shorter than half
        return shared
    own = build_model(counts)
    return own if bits - coded_bits(counts, own) > entry_bits(own) else shared


def _frequencies(steps: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Rows scaled to add up to 4096, at least 1 where there is a change; zeros at the end cut."""
    totals = steps.sum(axis=1, keepdims=True)
    scaled = np.maximum((steps << STEP_BITS) // np.maximum(totals, 1), steps > 0)
    # what rounding left over or took goes where it weighs least
    rows = np.arange(len(steps))
    scaled[rows, scaled.argmax(axis=1)] += ((totals > 0) << STEP_BITS)[:, 0] - scaled.sum(axis=1)
    used = NUM_STEP_SYMBOLS - (scaled[:, ::-1] > 0).argmax(axis=1)
    used[totals[:, 0] == 0] = 0
    return tuple(tuple(row[:n]) for row, n in zip(scaled.tolist(), used.tolist(), strict=True))
