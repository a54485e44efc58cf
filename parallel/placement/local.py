"""Bytes by local search: annealed swaps layer by layer; alternating assignment across layers.

The one idea: swaps keep every rank full and below its load limit, so each step is a placement.
Where results come home, layers do not see each other: each is annealed alone, on as many threads as
there are cores. Where tokens stay at their experts (resident), a layer between two that are fixed
is an assignment problem, solved exactly; layers take turns until none improves.

Shapes: L layers, E experts, R ranks, U token sets, P (expert, set) pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from gossamer.parallel.placement.costs import (
    Floats,
    Ints,
    linear_costs,
    link_costs,
    once_cost,
    once_rows,
    rank_loads,
    token_sets,
)
from gossamer.parallel.placement.kernels import anneal, assign, swap_linear
from gossamer.parallel.placement.problem import Problem

PROPOSALS_PER_PAIR, LEAST_PROPOSALS = 12, 300_000
"""Swaps proposed for a layer: for each pair of experts, and in all at least."""
HOT, COLD = 0.5, 0.002
"""First and last temperature, as a share of what a random swap changes."""
TRIAL, CHUNK = 2_000, 100_000
SHAKES, SHAKEN_SHARE = 500, 0.3
"""How often the joint search begins again, and the share of experts that change places before."""


def search_layers(
    problem: Problem, limit_L: Ints, starts: Sequence[Ints], until_s: float, seed: int = 0
) -> Ints:
    """rank_LE for dispatchers that bring results home.

    `starts`: tables rank_LE; of each layer the best of those within the limit is improved. Layers
    share the time until perf_counter() is `until_s`; given enough, the answer does not depend on
    the clock.
    """
    layers = len(problem.layers)
    threads = min(os.cpu_count() or 1, layers)

    def search(layer: int) -> Ints:
        """Layers begin in order, each with its share of what time is left."""
        own = [start[layer] for start in starts]
        layer_s = max(0.0, until_s - perf_counter()) * threads / max(threads, layers - layer)
        return _search_layer(problem, layer, int(limit_L[layer]), own, layer_s, seed)

    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(search, range(layers))))


def _search_layer(
    problem: Problem, layer: int, limit: int, starts: list[Ints], time_s: float, seed: int
) -> Ints:
    began_s = perf_counter()
    parts, value_of = _sets_problem(problem, layer, limit)
    load_E = problem.load_LE[layer]
    fits = [s for s in starts if np.bincount(s, load_E, problem.topology.ranks).max() <= limit]
    fits += [_nearest(parts[0], load_E, limit, start) for start in fits[:1]]
    ranked = sorted(fits, key=value_of)
    best_E = ranked[0]
    if problem.topology.ranks == 1 or perf_counter() - began_s > time_s:
        return best_E
    # descend from each start, then anneal from the best: a good start is never lost
    found = []
    for start in ranked:
        rank_E = start.copy()
        anneal(parts, rank_E, 1e-9, 1e-10, CHUNK // 4, seed)
        found.append(rank_E)
    best_E = min(found, key=value_of)
    heat = _typical_change(parts, best_E, seed)
    if heat == 0.0:
        return best_E
    wanted = max(LEAST_PROPOSALS, PROPOSALS_PER_PAIR * problem.experts**2)
    trial_s = perf_counter()
    anneal(parts, best_E.copy(), HOT * heat, HOT * heat, TRIAL * 5, seed)
    each_s = (perf_counter() - trial_s) / (TRIAL * 5)
    left_s = time_s - (perf_counter() - began_s)
    proposals = int(min(wanted, max(0.0, 0.9 * left_s) / max(each_s, 1e-9)))
    for hot in (HOT, HOT / 8):
        rank_E = best_E.copy()
        anneal(parts, rank_E, hot * heat, COLD * heat, proposals // 2, seed)
        best_E = min(best_E, rank_E, key=value_of)
    return best_E


def _sets_problem(problem: Problem, layer: int, limit: int):  # noqa: ANN202
    """What the kernel `anneal` takes, and the value of a rank_E in its units."""
    once, cost_ER = once_cost(problem), linear_costs(problem, layer)
    sets = expert_UK, home_U, count_U = token_sets(problem, layer)
    set_U, slot_K = (expert_UK >= 0).nonzero()
    expert_P = expert_UK[set_U, slot_K]
    order_P = np.argsort(expert_P, kind="stable")
    first_E = np.searchsorted(expert_P[order_P], np.arange(problem.experts + 1))
    load_E = np.ascontiguousarray(problem.load_LE[layer])
    parts = (
        *(cost_ER, once, load_E, limit, problem.topology.ranks_per_node),
        *(expert_UK, home_U, count_U, first_E, set_U[order_P]),
    )

    def value_of(rank_E: Ints) -> float:
        linear = float(cost_ER[np.arange(len(rank_E)), rank_E].sum())
        return linear + once * once_rows(problem, sets, rank_E) if once else linear

    return parts, value_of


def _nearest(cost_ER: Floats, load_E: Ints, limit: int, start: Ints) -> Ints:
    """The placement of least linear cost, or what swaps make of the start where that is too much
    for a rank."""
    experts, ranks = cost_ER.shape
    rank_E = assign(np.repeat(cost_ER, experts // ranks, axis=1)) // (experts // ranks)
    if np.bincount(rank_E, load_E, ranks).max() > limit:
        rank_E = start.copy()
        swap_linear(cost_ER, rank_E, load_E, limit)
    return rank_E


def _typical_change(parts: tuple, rank_E: Ints, seed: int) -> float:
    """Roughly what a swap changes: spread of linear costs, and tokens of an expert."""
    cost_ER, once, _, _, _, _, _, count_U, first_E, _ = parts
    tokens = float(count_U.mean()) * float(np.diff(first_E).mean()) if len(count_U) else 0.0
    return float(cost_ER.std(1).mean()) + once * tokens / 4


def search_joint(
    problem: Problem, limit_L: Ints, starts: Sequence[Ints], until_s: float, seed: int = 0
) -> Ints:
    """rank_LE for tokens that stay at their experts, from each start and then shaken ones."""
    random = np.random.default_rng(seed)
    best_LE, best = starts[0], np.inf
    link_RR = link_costs(problem)
    for turn in range(len(starts) + SHAKES):
        if turn and perf_counter() > until_s:
            break
        rank_LE = starts[turn].copy() if turn < len(starts) else best_LE.copy()
        if turn >= len(starts):
            for rank_E in rank_LE:
                shaken = random.permutation(problem.experts)
                shaken = shaken[: max(2, round(SHAKEN_SHARE * problem.experts))]
                rank_E[shaken] = rank_E[random.permutation(shaken)]
        _take_turns(problem, rank_LE, limit_L, link_RR, until_s)
        value = joint_value(problem, rank_LE, link_RR)
        is_within = (rank_loads(problem.load_LE, rank_LE, len(link_RR)).max(1) <= limit_L).all()
        if value < best and is_within:
            best_LE, best = rank_LE, value
    return best_LE


def joint_value(problem: Problem, rank_LE: Ints, link_RR: Floats) -> float:
    pairs = zip(problem.flow_LEE, rank_LE, rank_LE[1:], strict=False)
    return sum(float((flow * link_RR[here][:, there]).sum()) for flow, here, there in pairs)


def _take_turns(
    problem: Problem, rank_LE: Ints, limit_L: Ints, link_RR: Floats, until_s: float
) -> None:
    """Each layer in turn to its best place between its neighbours, until none moves; in place."""
    ranks, each = len(link_RR), problem.slots_per_rank
    value = joint_value(problem, rank_LE, link_RR)
    while True:
        for layer, rank_E in enumerate(rank_LE):
            cost_ER = np.zeros((problem.experts, ranks))
            if layer:
                cost_ER += problem.flow_LEE[layer - 1].T @ link_RR[rank_LE[layer - 1]]
            if layer + 1 < len(rank_LE):
                cost_ER += problem.flow_LEE[layer] @ link_RR[rank_LE[layer + 1]]
            load_E, limit = problem.load_LE[layer], int(limit_L[layer])
            best_E = assign(np.repeat(cost_ER, each, axis=1)) // each
            before = np.bincount(rank_E, load_E, ranks).max()
            if np.bincount(best_E, load_E, ranks).max() <= limit:
                rank_E[:] = best_E
            else:  # a shaken layer may be over its limit: then no worse than it is
                swap_linear(cost_ER, rank_E, load_E, max(limit, int(before)))
        found = joint_value(problem, rank_LE, link_RR)
        if found >= value - 1e-9 * abs(value) or perf_counter() > until_s:
            return
        value = found
