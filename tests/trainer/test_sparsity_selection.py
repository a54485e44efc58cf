"""Exact top-k over ranks is the stable sort of one process, to the bit; masks hash alike."""

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.trainer.sparsity.config import (
    DistributionConfig,
    PatternConfig,
    RuleConfig,
    ScheduleConfig,
    SparsityConfig,
)
from gossamer.trainer.sparsity.method import Horizon, Point
from gossamer.trainer.sparsity.plan import SparsityPlan
from gossamer.trainer.sparsity.recipes import RECIPES
from gossamer.trainer.sparsity.selection import Piece, mask_hash, score_keys, select, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_bands import ALONE, EXPERTS, as_ranks, make_bands

KEYS = st.one_of(st.integers(-1, 3), st.integers(0, 2**31 - 1))
POOLS = st.lists(  # pools of pieces of keys
    st.lists(st.lists(KEYS, min_size=1, max_size=12), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


def stable_top(pool: list[list[int]], keep: int) -> list[list[bool]]:
    """The plain reference: sort by key, then by place."""
    places = [(-k, p, i) for p, piece in enumerate(pool) for i, k in enumerate(piece) if k >= 0]
    best = {(p, i) for _, p, i in sorted(places)[:keep]}
    return [[(p, i) in best for i in range(len(piece))] for p, piece in enumerate(pool)]


@settings(deadline=None, max_examples=60)
@given(pools=POOLS, share=st.floats(0.0, 1.0), world=st.integers(1, 3), data=st.data())
def test_it_is_the_stable_sort_however_pieces_are_dealt_out(pools, share, world, data):
    candidates = [sum(k >= 0 for piece in pool for k in piece) for pool in pools]
    keep = [round(share * n) for n in candidates]
    expected = [mask for pool, k in zip(pools, keep, strict=True) for mask in stable_top(pool, k)]
    pieces, slot = [], 0
    for number, pool in enumerate(pools):
        for piece in pool:
            keys = torch.tensor(piece, dtype=torch.int32)
            pieces.append(Piece(number, slot, lambda keys=keys: keys))
            slot += 1
    owner = [data.draw(st.integers(0, world - 1)) for _ in pieces]
    slots_P = torch.tensor([len(pool) for pool in pools])

    def run(rank, reduce):
        mine = [i for i, o in enumerate(owner) if o == rank]
        masks = select([pieces[i] for i in mine], torch.tensor(keep), slots_P, reduce)
        return dict(zip(mine, masks, strict=True))

    found = {i: mask for masks in as_ranks(world, run) for i, mask in masks.items()}
    assert [found[i].tolist() for i in range(len(pieces))] == expected


def test_more_than_there_is_is_refused():
    piece = Piece(0, 0, lambda: torch.tensor([1, -1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="pool 0 has 2 candidates; expected at least the 3"):
        select([piece], torch.tensor([3]), torch.tensor([1]), ALONE)


def test_keys_sort_like_scores_and_nan_is_refused():
    scores = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1.0000001, 3e38, float("inf")])
    assert score_keys(scores, "w").diff().gt(0).all()
    with pytest.raises(ValueError, match="w: a score is NaN"):
        score_keys(torch.tensor([1.0, float("nan")]), "w")


def test_random_scores_are_uniform_and_of_places_not_of_calls():
    whole = uniform("w", 0, 100_000, "a")
    assert torch.equal(whole[500:700], uniform("w", 500, 200, "a"))
    assert abs(float(whole.mean()) - 0.5) < 0.005 and abs(float(whole.var()) - 1 / 12) < 0.002
    others = [uniform("w", 0, 100_000, "b"), uniform("v", 0, 100_000, "a"), whole.roll(1)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([whole, other]))[0, 1])) < 0.02


PLANS = {
    "global with floor": DistributionConfig(kind="global", floor=0.2, ceiling=0.4),
    "erk": DistributionConfig(kind="erk"),
}


def plan_of(name: str) -> SparsityPlan:
    if name in RECIPES:
        config = RECIPES[name]
    else:
        schedule = ScheduleConfig(kind="linear", density=0.3)
        pattern = PatternConfig()
        if name == "blocks":
            pattern = PatternConfig(kind="block", block_rows=8, block_columns=8)
        distribution = PLANS.get(name, DistributionConfig(kind="global"))
        rule = RuleConfig(schedule=schedule, distribution=distribution, pattern=pattern)
        config = SparsityConfig(rules=(rule,))
    plan = SparsityPlan(config)
    plan.begin(SHAPES, Horizon(1000))
    return plan


NAMES = [*PLANS, "blocks", "set", "granet"]
SHAPES = {name: shape for name, shape in EXPERTS.items() if ".layers.0." in name}


def masks_of(rank: int, world: int, reduce) -> dict[str, list[int]]:
    """Hash of this rank's masks after each of some updates, two words of 32 bits each."""
    hashes = {}
    for name in NAMES:
        plan, bands = plan_of(name), make_bands(SHAPES, rank=rank, world=world)
        hashes[name] = []
        for step in (0, 300):
            for band, mask in zip(bands, plan.update(bands, Point(step), reduce), strict=True):
                band.mask_RC = mask
            hashes[name].append(mask_hash(bands))
    return hashes


def on_a_rank() -> dict[str, list[str]]:
    hashes = masks_of(dist.get_rank(), dist.get_world_size(), dist.all_reduce)
    totals = {}
    for name, values in hashes.items():
        words = torch.tensor([[v >> 32, v & 0xFFFFFFFF] for v in values])
        dist.all_reduce(words)
        totals[name] = [f"{((high << 32) + low) % 2**64:016x}" for high, low in words.tolist()]
    return totals


@pytest.mark.parametrize("world", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_gloo_ranks_come_to_the_masks_of_one_process(world):
    alone = masks_of(0, 1, ALONE)
    expected = {name: [f"{value:016x}" for value in values] for name, values in alone.items()}
    assert len(set(expected["set"])) == len(expected["set"])
    assert run_world(on_a_rank, world) == [expected] * world
