"""Ownership of rows against a reference that looks at every element."""

import math

import pytest
from gossamer.parallel.flat_layout import FlatLayout, Segment
from hypothesis import given
from hypothesis import strategies as st

BAND = 64  # DECISIONS 1: written out, so that a change of BAND_ROWS is seen


@st.composite
def layouts(draw):
    """A few vectors and matrices in a row, padding in front, cut anywhere."""
    shapes = draw(
        st.lists(
            st.one_of(
                st.tuples(st.integers(1, 300)),
                st.tuples(st.integers(1, 300), st.integers(1, 9)),
                st.tuples(st.integers(1, 70), st.integers(1, 3), st.integers(1, 3)),
            ),
            min_size=1,
            max_size=5,
        )
    )
    segments, offset = [], draw(st.integers(0, 20))
    for number, shape in enumerate(shapes):
        segments.append(Segment(f"t{number}", shape, offset))
        offset = segments[-1].stop
    return FlatLayout(tuple(segments), draw(st.integers(1, offset + 10)))


def bands(segment: Segment) -> list[list[int]]:
    """Rows that must share an owner."""
    rows = list(range(segment.shape[0]))
    if len(segment.shape) == 1:
        return [rows]
    return [rows[i : i + BAND] for i in range(0, len(rows), BAND)]


def elements(segment: Segment, row: int) -> range:
    size = math.prod(segment.shape[1:])
    return range(segment.start + row * size, segment.start + (row + 1) * size)


@given(layouts())
def test_every_row_is_in_one_run_of_the_owner_of_its_bands_first_element(layout):
    found = {}
    for run in layout.runs():
        for row in range(run.row_start, run.row_stop):
            assert (run.segment.name, row) not in found
            found[run.segment.name, row] = run.owner
        assert run.start == elements(run.segment, run.row_start).start
        assert run.stop == elements(run.segment, run.row_stop - 1).stop
    expected = {
        (segment.name, row): elements(segment, band[0]).start // layout.partition_size
        for segment in layout.segments
        for band in bands(segment)
        for row in band
    }
    assert found == expected


@given(layouts())
def test_only_a_band_that_straddles_a_cut_is_moved(layout):
    """A run lies whole in its owner's partition, or is one band; runs come in order."""
    runs = list(layout.runs())
    assert [(r.segment.start, r.row_start) for r in runs] == sorted(
        (r.segment.start, r.row_start) for r in runs
    )
    for run in runs:
        partitions = {e // layout.partition_size for e in range(run.start, run.stop)}
        if partitions != {run.owner}:
            assert list(range(run.row_start, run.row_stop)) in bands(run.segment)
    for before, after in zip(runs, runs[1:], strict=False):  # neighbours merge if they can
        same = (before.segment, before.owner) == (after.segment, after.owner)
        whole = all(len(layout.pieces(run.start, run.stop)) == 1 for run in (before, after))
        assert not (same and whole)


@given(layouts(), st.integers(0, 500), st.integers(1, 500))
def test_pieces_partition_a_range(layout, start, length):
    pieces = layout.pieces(start, start + length)
    covered = [(p, e) for p, low, high in pieces for e in range(low, high)]
    assert covered == [(e // layout.partition_size, e) for e in range(start, start + length)]
    assert len({p for p, *_ in pieces}) == len(pieces)
    assert all(low < high for _, low, high in pieces)


@given(layouts(), st.integers(0, 2000), st.integers(0, 700))
def test_rows_in_are_the_rows_that_meet_a_range(layout, start, length):
    for segment in layout.segments:
        meet = [
            row
            for row in range(segment.shape[0])
            if any(start <= e < start + length for e in elements(segment, row))
        ]
        expected = (meet[0], meet[-1] + 1) if meet else None
        assert layout.rows_in(segment, start, start + length) == expected


def test_by_hand():
    """130 rows of 2 and a vector of 10, cut at 200: the band of rows 64..127 straddles the cut."""
    matrix, vector = Segment("w", (130, 2), 0), Segment("b", (10,), 260)
    layout = FlatLayout((matrix, vector), 200)
    assert [(r.segment.name, r.row_start, r.row_stop, r.owner) for r in layout.runs()] == [
        ("w", 0, 64, 0),
        ("w", 64, 128, 0),
        ("w", 128, 130, 1),
        ("b", 0, 10, 1),
    ]
    assert layout.pieces(128, 256) == [(0, 128, 200), (1, 200, 256)]
    assert layout.rows_in(matrix, 199, 201) == (99, 101)
    assert layout.rows_in(vector, 0, 260) is None


@pytest.mark.parametrize("cuts", [1, 2, 3])
def test_a_vector_longer_than_a_partition_has_one_owner(cuts):
    layout = FlatLayout((Segment("b", (cuts * 10,), 5),), 10)
    (run,) = layout.runs()
    assert (run.row_start, run.row_stop, run.owner) == (0, cuts * 10, 0)
    assert len(layout.pieces(run.start, run.stop)) == cuts + 1
