"""Exact methods against brute force; bounds never above the best placement."""

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from gossamer.parallel.placement.bound import balance_bound, bytes_bound, joint_bound
from gossamer.parallel.placement.costs import linear_costs, load_limits, once_cost
from gossamer.parallel.placement.kernels import assign
from gossamer.parallel.placement.moetuner import (
    chained_ranks,
    published_clusters,
    published_ranks,
)
from gossamer.parallel.placement.placement import from_ranks
from gossamer.parallel.placement.score import score, tokens_to_nodes
from gossamer.parallel.placement.solve import place
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import SHAPES, every, random_problem, tables

HOME_DISPATCHES = ("one_level", "two_level", "summed")
seeds, shapes = st.integers(0, 10**6), st.sampled_from(SHAPES)
small = st.sampled_from([shape for shape in SHAPES if shape[0] == 4])
few = settings(max_examples=8, deadline=None)


def best_within(problem) -> float:
    """The smallest value within the load limits, by trying everything."""
    tried = list(every(problem))
    most = np.array([[min(t) for t in zip(*(m for _, m in tried), strict=True)]])
    limit_L = load_limits(problem, most[0])
    return min(value for value, busiest_L in tried if (busiest_L <= limit_L).all())


@few
@given(seeds, shapes)
def test_balance_is_optimal(seed, shape):
    problem = random_problem(seed, shape, layers=1 + seed % 2)
    best = min(value for value, _ in every(problem))
    for method in ("ilp", "auto"):
        placed = place(problem, method, time_limit_s=20, gap=0.0)
        assert placed.value == placed.bound == best
    assert sum(balance_bound(w, problem.topology.ranks) for w in problem.load_LE) <= best


@few
@given(seeds, shapes, st.sampled_from(HOME_DISPATCHES), st.sampled_from([None, 0.25]))
def test_bytes_are_minimal_within_the_load_limits(seed, shape, dispatch, near):
    slack = (None, 0.0, 5.0)[seed % 3]
    problem = random_problem(
        seed, shape, objective="bytes", dispatch=dispatch, near=near, slack=slack
    )
    best = best_within(problem)
    for method in ("ilp", "auto"):
        placed = place(problem, method, time_limit_s=20, gap=0.0)
        assert placed.value == pytest.approx(best, rel=1e-9)
        assert placed.bound == pytest.approx(best, rel=1e-6)
    assert place(problem, "local").value >= best


@few
@given(seeds, small)
def test_flows_are_minimal_where_tokens_stay(seed, shape):
    problem = random_problem(
        *(seed, shape),
        **{"objective": "bytes", "dispatch": "resident", "slack": 0.5},
        layers=3 if shape == (4, 2, 1) else 2,
    )
    best = best_within(problem)
    placed = place(problem, "ilp", time_limit_s=20, gap=0.0)
    assert placed.value == pytest.approx(best, rel=1e-9)
    assert placed.bound == pytest.approx(best, rel=1e-6)
    assert place(problem, "local", time_limit_s=0.2).value >= best - 1e-9


@few
@given(seeds, shapes, st.sampled_from(HOME_DISPATCHES), st.sampled_from([None, 0.5]))
def test_no_placement_is_below_the_bound_of_bytes(seed, shape, dispatch, near):
    problem = random_problem(seed, shape, objective="bytes", dispatch=dispatch, near=near)
    assert bytes_bound(problem, 0) <= min(value for value, _ in every(problem))


@few
@given(seeds, small, st.sampled_from([None, 0.5]))
def test_no_placement_is_below_the_bound_of_flows(seed, shape, near):
    problem = random_problem(
        seed, shape, objective="bytes", dispatch="resident", layers=2, near=near
    )
    assert joint_bound(problem) <= min(value for value, _ in every(problem))


@few
@given(seeds, shapes, st.sampled_from(HOME_DISPATCHES), st.sampled_from([None, 0.5]))
def test_bytes_are_a_linear_part_and_tokens_to_nodes(seed, shape, dispatch, near):
    problem = random_problem(
        seed, shape, objective="bytes", dispatch=dispatch, near=near, sources="seen"
    )
    ranks, per_node = problem.topology.ranks, problem.topology.ranks_per_node
    rank_E = np.array(tables(problem.experts, ranks)[seed % 6])
    value = linear_costs(problem, 0)[np.arange(problem.experts), rank_E].sum()
    tokens_RN = tokens_to_nodes(problem, 0, rank_E)
    tokens_RN[np.arange(ranks), np.arange(ranks) // per_node] = 0
    value += once_cost(problem) * tokens_RN.sum()
    found = score(problem, from_ranks(rank_E[None], ranks))
    assert found.value == pytest.approx(value)
    # with even sources the value is the mean over whose tokens they are
    means = [
        score(replace(problem, **moved_sources(problem, by)), from_ranks(rank_E[None], ranks)).value
        for by in range(ranks)
    ]
    even = score(replace(problem, sources="even"), from_ranks(rank_E[None], ranks))
    assert even.value == pytest.approx(np.mean(means))
    assert even.across_bytes == found.across_bytes
    if dispatch == "summed":  # a row for each (token, other node), there and back, twice
        assert found.across_bytes == 4 * 8 * tokens_RN.sum()


def moved_sources(problem, by: int) -> dict:
    """The same tokens on ranks that are `by` further."""
    ranks = problem.topology.ranks
    sets = tuple(replace(s, source_U=(s.source_U + by) % ranks) for s in problem.sets)
    return {"sets": sets, "source_LRE": np.roll(problem.source_LRE, by, axis=1)}


@few
@given(st.integers(1, 5), seeds)
def test_assignment_is_exact(size, seed):
    cost = np.random.default_rng(seed).integers(-9, 9, (size, size)).astype(float)
    rows = np.arange(size)
    best = min(cost[rows, list(p)].sum() for p in permutations(range(size)))
    assert cost[rows, assign(cost)].sum() == best


@few
@given(seeds)
def test_moetuners_second_stage_is_exact_on_equal_links(seed):
    random = np.random.default_rng(seed)
    clusters_LE = np.stack([random.permutation(6) // 2 for _ in range(3)])
    flow_LEE = random.integers(0, 30, (2, 6, 6))
    cost_RR = 2.0 * (1 - np.eye(3))

    def value(rank_LE) -> float:
        return sum((flow_LEE[i] * cost_RR[rank_LE[i]][:, rank_LE[i + 1]]).sum() for i in range(2))

    renamed = product(permutations(range(3)), repeat=2)
    best = min(
        value([clusters_LE[0], np.array(p)[clusters_LE[1]], np.array(q)[clusters_LE[2]]])
        for p, q in renamed
    )
    assert value(chained_ranks(clusters_LE, flow_LEE, cost_RR)) == best


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_moetuner_as_published(seed):
    random = np.random.default_rng(seed)
    load_E = random.integers(1, 40, 5)
    cluster_E = published_clusters(load_E, 2, 20.0, 0.0)
    mean = load_E.sum() / 2
    off = [
        abs(load_E[[*c]].sum() - mean) for c in product([False, True], repeat=5) if 0 < sum(c) < 5
    ]
    assert 2 * abs(load_E[cluster_E == 0].sum() - mean) == pytest.approx(2 * min(off))

    flow_LCC, cost_RR = random.integers(0, 30, (2, 3, 3)), 1.0 - np.eye(3)
    orders = [np.array(p) for p in permutations(range(3))]

    def value(rank_LC) -> float:
        return sum((flow_LCC[i] * cost_RR[rank_LC[i]][:, rank_LC[i + 1]]).max() for i in range(2))

    best = min(value(rank_LC) for rank_LC in product(orders, repeat=3))
    rank_LC, bound = published_ranks(flow_LCC, cost_RR, 20.0, 0.0)
    assert value(rank_LC) == pytest.approx(best) and bound == pytest.approx(best)
