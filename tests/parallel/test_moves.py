"""Copies between shards put every tensor where it is to be, whatever the cuts."""

import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.flat_layout import Segment
from gossamer.parallel.placement.apply import Copy, copies, exchange
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def cases(draw):
    """Slots of some sizes on each expert rank, the names in them, and how buffers are cut."""
    expert, data = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    first, padding = draw(st.integers(0, 5)), draw(st.integers(0, 7))
    alike: dict[int, list[tuple[int, int]]] = {}
    for rank in range(expert):
        for slot, size in enumerate(sizes):
            alike.setdefault(size, []).append((rank, slot))
    buffers = []
    for _ in range(2):  # names of one size change places
        names = {}
        for size, places in alike.items():
            order = draw(st.permutations(range(len(places))))
            names |= {place: f"{size}-{n}" for place, n in zip(places, order, strict=True)}
        buffers.append(
            [[names[rank, slot] for slot in range(len(sizes))] for rank in range(expert)]
        )
    total = first + sum(sizes) + padding
    shard = draw(st.one_of(st.none(), st.just(-(-total // data))))
    return expert, data, sizes, first, buffers, shard, total


def segments(names: list[str], sizes: list[int], first: int) -> tuple[Segment, ...]:
    placed = []
    for name, size in zip(names, sizes, strict=True):
        placed.append(Segment(name, (size,), first))
        first += size
    return tuple(placed)


@given(cases())
def test_every_tensor_arrives_whole(case):
    expert, data, sizes, first, (before, after), shard, total = case
    was, will_be = ([segments(names, sizes, first) for names in rows] for rows in (before, after))
    dims = ParallelDims(data=data, expert=expert, rank=0, expert_group=None)
    width = total if shard is None else shard
    held = torch.full((data * expert, width), -1)

    def element(d: int, rank: int, at: int) -> tuple[int, int]:
        """World rank and place of element `at` of the d-th set's buffer of an expert rank."""
        if shard is None:
            return d * expert + rank, at
        return at // shard * expert + rank, at % shard

    sets = range(data if shard is None else 1)
    value = {name: 100 * n for n, name in enumerate(sorted(sum(before, [])))}
    for d in sets:
        for rank, row in enumerate(was):
            for s in row:
                for i in range(s.stop - s.start):
                    held[element(d, rank, s.start + i)] = value[s.name] + i
    old, touched = held.clone(), torch.zeros_like(held)
    for c in copies(was, will_be, dims, shard):
        source = old[c.source, c.start : c.start + c.count]
        held[c.target, c.target_start : c.target_start + c.count] = source
        touched[c.target, c.target_start : c.target_start + c.count] += 1
        assert shard is not None or c.source // expert == c.target // expert
    assert touched.max() <= 1
    for d in sets:
        for rank, row in enumerate(will_be):
            for s in row:
                for i in range(s.stop - s.start):
                    assert held[element(d, rank, s.start + i)] == value[s.name] + i


@pytest.mark.parametrize("names", [["a", "c"], ["a", "a"], ["a"]])
def test_what_is_lost_or_new_is_refused_by_name(names):
    dims = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
    now, then = segments(["a", "b"], [2, 2], 0), segments(names, [2] * len(names), 0)
    with pytest.raises(ValueError, match="^b is at .*: expected one tensor$|^c is at"):
        list(copies([now], [then], dims, None))


def exchange_odd_dtypes() -> dict:
    """A mask, bfloat16 and float32 go along one list; 3 elements go round, 2 stay."""
    rank = torch.distributed.get_rank()
    shards = [
        torch.arange(5) % 2 == rank,
        torch.full((5,), float(rank), dtype=torch.bfloat16),
        torch.arange(5.0) + 10 * rank,
    ]
    work = [(Copy(r, 0, 1 - r, 2, 3), shards) for r in range(2)]
    sent = exchange(work)
    return {"sent": sent, "shards": [shard.float() for shard in shards]}


def test_any_dtype_goes_along():
    for rank, found in enumerate(run_world(exchange_odd_dtypes, 2)):
        assert found["sent"] == 3 * (1 + 2 + 4)
        own = torch.arange(5) % 2 == rank
        other = torch.arange(5) % 2 == 1 - rank
        mask, half, full = found["shards"]
        assert mask.bool().tolist() == [*own[:2].tolist(), *other[:3].tolist()]
        assert half.tolist() == [rank, rank, 1 - rank, 1 - rank, 1 - rank]
        assert full.tolist() == [
            10.0 * rank,
            10.0 * rank + 1,
            *(10.0 * (1 - rank) + i for i in range(3)),
        ]
