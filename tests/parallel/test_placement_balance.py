"""Balance: EPLB to the letter, bounds below every placement, swaps that reach them."""

from functools import cache
from itertools import permutations

import numpy as np
import pytest
from gossamer.parallel.placement.bound import balance_bound
from gossamer.parallel.placement.eplb import rebalance
from gossamer.parallel.placement.greedy import balanced, lpt
from hypothesis import given, settings
from hypothesis import strategies as st

README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_ANSWER = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
"""As deepseek-ai/EPLB's README prints it: 16 replicas, 4 groups, 2 nodes, 8 GPUs."""


def busiest(load_E, rank_E, ranks: int) -> int:
    return int(np.bincount(rank_E, load_E, ranks).max())


@cache
def all_placements(experts: int, ranks: int) -> list[tuple[int, ...]]:
    return sorted(set(permutations([r for r in range(ranks) for _ in range(experts // ranks)])))


@st.composite
def loads(draw, sizes=((4, 2), (6, 2), (6, 3), (4, 4))):
    experts, ranks = draw(st.sampled_from(sizes))
    top = draw(st.sampled_from([1, 20, 5000]))
    return np.array(draw(st.lists(st.integers(0, top), min_size=experts, max_size=experts))), ranks


def test_eplb_answers_as_its_readme():
    found = rebalance(README_LOADS, slots=16, groups=4, nodes=2, ranks=8)
    assert found.slots_LP.tolist() == README_ANSWER
    for slots_P, replicas_EX in zip(found.slots_LP, found.replica_LEX, strict=True):
        for expert, slots_X in enumerate(replicas_EX):
            assert (
                sorted(x for x in slots_X if x >= 0) == np.flatnonzero(slots_P == expert).tolist()
            )
    assert (found.count_LE == (found.replica_LEX >= 0).sum(2)).all()
    assert found.rank_loads(README_LOADS, 8).sum(1).tolist() == pytest.approx([1033, 1156])


@settings(deadline=None)
@given(loads(), st.integers(0, 3))
def test_eplb_global_puts_the_heaviest_on_the_lightest(case, spare):
    load_E, ranks = case
    slots = len(load_E) + spare * ranks
    found = rebalance([load_E], slots, groups=3, nodes=2, ranks=ranks)  # 2 does not divide 3
    held = found.slots_LP.reshape(ranks, -1)
    copies = [1] * len(load_E)  # word for word: the largest share is halved again
    for _ in range(spare * ranks):
        share = [np.float32(w) / np.float32(c) for w, c in zip(load_E, copies, strict=True)]
        copies[int(np.argmax(share))] += 1
    assert found.count_LE.tolist() == [copies]
    if held.shape[1] > 1:  # one slot a rank: in the order of replicas
        share = (load_E / np.array(copies))[held]
        assert share[share.sum(1).argmax()].sum() <= share.sum() / ranks + share.max()


@pytest.mark.parametrize("sizes", [(12, 12, 5, 1, 4), (12, 15, 4, 2, 8), (12, 8, 4, 2, 8)])
def test_eplb_refuses_sizes_that_do_not_divide(sizes):
    experts, slots, groups, nodes, ranks = sizes
    with pytest.raises(ValueError, match="eplb: .* do not"):
        rebalance(np.ones((1, experts)), slots, groups, nodes, ranks)


@settings(deadline=None)
@given(loads())
def test_the_bound_is_below_every_placement_and_swaps_above_it(case):
    load_E, ranks = case
    best = min(busiest(load_E, r, ranks) for r in all_placements(len(load_E), ranks))
    assert balance_bound(load_E, ranks) <= best
    for rank_E in (lpt(load_E, ranks), balanced(load_E, ranks)):
        assert (np.bincount(rank_E, minlength=ranks) == len(load_E) // ranks).all()
        assert busiest(load_E, rank_E, ranks) >= best
    assert busiest(load_E, balanced(load_E, ranks), ranks) <= busiest(
        load_E, lpt(load_E, ranks), ranks
    )


def test_the_bound_counts_who_must_share():
    assert balance_bound(np.array([9, 1, 1, 1]), 2) == 10  # the heaviest beside the lightest
    assert balance_bound(np.array([9, 9, 9, 0, 0, 0]), 2) == 18  # of three, two share a rank
    assert balance_bound(np.array([3, 3, 3, 4]), 2) == 7  # the mean, rounded up


LOADS = {
    "near uniform": lambda random: random.poisson(4000, 256),
    "mild": lambda random: random.gamma(8, 500, 256).astype(int),
    "exponential": lambda random: random.exponential(4000, 256).astype(int),
    "zipf": lambda random: (1e5 / random.permutation(np.arange(1, 257)) ** 0.8).astype(int),
}


@pytest.mark.parametrize("kind", LOADS)
def test_256_experts_on_32_ranks_are_balanced_to_a_thousandth_and_not_worse_than_eplb(kind):
    for seed in range(3):
        load_E = LOADS[kind](np.random.default_rng(seed))
        found = busiest(load_E, balanced(load_E, 32), 32)
        assert found <= balance_bound(load_E, 32) * 1.001
        for groups, nodes in ((1, 1), (8, 4)):
            eplb_E = np.argsort(rebalance([load_E], 256, groups, nodes, 32).slots_LP[0]) // 8
            assert found <= busiest(load_E, eplb_E, 32)
