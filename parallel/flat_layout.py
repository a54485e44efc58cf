"""Where each row of each logical tensor lies in a flat, partitioned buffer, and who owns it.

The one idea: a band (at most 64 rows) belongs to the partition that holds its first element. So
ownership follows the shards as they lie, and only the bands that straddle a partition's end have
to be moved at all: at most one a boundary.

Pure arithmetic; no tensors, no communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gossamer.parallel.engine import BAND_ROWS


@dataclass(frozen=True, slots=True)
class Segment:
    """One logical tensor at flat elements [start, stop) of its buffer."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one segment with one owner."""

    segment: Segment
    row_start: int
    row_stop: int
    owner: int

    @property
    def start(self) -> int:
        return self.segment.start + self.row_start * self.segment.row_elements

    @property
    def stop(self) -> int:
        return self.segment.start + self.row_stop * self.segment.row_elements


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Segments of a buffer that is cut into partitions of equal size."""

    segments: tuple[Segment, ...]
    partition_size: int

    def partition_of(self, element: int) -> int:
        return element // self.partition_size

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(partition, start, stop) of the parts of [start, stop) that lie in each partition."""
        cuts = range(self.partition_of(start), self.partition_of(stop - 1) + 1)
        size = self.partition_size
        return [(p, max(start, p * size), min(stop, (p + 1) * size)) for p in cuts]

    def runs(self) -> Iterator[Run]:
        """All rows in runs: neighbouring bands of one owner merge, straddling bands do not."""
        for segment in self.segments:
            merged: Run | None = None
            for band in self._bands(segment):
                whole = len(self.pieces(band.start, band.stop)) == 1
                if merged and whole and merged.owner == band.owner:
                    merged = Run(segment, merged.row_start, band.row_stop, band.owner)
                    continue
                if merged:
                    yield merged
                merged = band if whole else None
                if not whole:
                    yield band
            if merged:
                yield merged

    def _bands(self, segment: Segment) -> Iterator[Run]:
        rows = segment.shape[0]
        height = BAND_ROWS if len(segment.shape) > 1 else rows
        for row in range(0, rows, height):
            first = segment.start + row * segment.row_elements
            yield Run(segment, row, min(row + height, rows), self.partition_of(first))

    def rows_in(self, segment: Segment, start: int, stop: int) -> tuple[int, int] | None:
        """Rows of `segment` that meet flat elements [start, stop), or None."""
        start, stop = max(start, segment.start), min(stop, segment.stop)
        if start >= stop:
            return None
        first = (start - segment.start) // segment.row_elements
        last = (stop - 1 - segment.start) // segment.row_elements
        return first, last + 1
