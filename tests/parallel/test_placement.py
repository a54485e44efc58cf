"""Placements as data: canonical slots, files in logical names, wrong files refused."""

import json

import numpy as np
import pytest
from gossamer.parallel.placement.placement import (
    contiguous,
    from_ranks,
    load_placement,
    save_placement,
)
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def tables(draw):
    layers, ranks, each = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    row = st.permutations([r for r in range(ranks) for _ in range(each)])
    return np.array([draw(row) for _ in range(layers)]), ranks


@given(tables())
def test_ranks_and_slots_say_the_same(case):
    rank_LE, ranks = case
    placement = from_ranks(rank_LE, ranks)
    assert (placement.rank_LE == rank_LE).all()
    for row, slots in zip(rank_LE, placement.slots_LS, strict=True):
        for rank in range(ranks):
            held = slots[rank * placement.slots_per_rank : (rank + 1) * placement.slots_per_rank]
            assert held.tolist() == [e for e, r in enumerate(row) if r == rank]


def test_contiguous_is_what_dispatch_does_without_a_placement():
    placement = contiguous(2, 8, 4)
    assert placement.slots_LS.tolist() == [list(range(8))] * 2
    assert placement.rank_LE.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    assert placement.moved(from_ranks([[0, 0, 1, 1, 2, 2, 3, 3], [1, 0, 0, 1, 2, 2, 3, 3]], 4)) == 2


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "p.json"
    placement = from_ranks([[1, 0, 1, 0], [0, 1, 1, 0]], 2, layers=(3, 11), method="lpt")
    save_placement(placement, path)
    assert json.loads(path.read_text())["layers"] == {"3": [1, 0, 1, 0], "11": [0, 1, 1, 0]}
    again = load_placement(path)
    assert (again.slots_LS == placement.slots_LS).all()
    assert (again.layers, again.ranks, again.method) == ((3, 11), 2, "lpt")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "x"}, "expected 'gossamer placement 1'"),
        ({"layers": {"0": [0, 1, 1]}}, "expected a rank for each of 4 experts"),
        ({"layers": {"0": [0, 1, 1, 2]}}, "expected 2 experts on each of 2 ranks"),
        ({"layers": {"0": [0, 1, 1, 1]}}, "expected 2 experts on each of 2 ranks"),
        ({"layers": {"a": [0, 1, 1, 0]}}, "'a'"),
        ({"layers": []}, "items"),
        ({"layers": {"0": [0, 1, 1, "0"]}}, "table of ranks"),
        ({"layers": {}}, "table of ranks"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, change, reason):
    path = tmp_path / "p.json"
    save_placement(contiguous(1, 4, 2), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{path} is not a placement: .*{reason}"):
        load_placement(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path} is not a placement"):
        load_placement(path)
