"""`place`: one problem, any method, a placement with its value, a lower bound and what proves it.

The one idea: heuristics find and bounds prove. Every method gives a table of ranks and a bound with
its argument; the value is counted by score.py, never by the solver itself.

Balance: min of the busiest ranks' pairs, summed over layers. Bytes: min of bytes times the cost of
their link, of the problem's dispatcher; eplb, lpt and contiguous do not look at it, the others
keep every rank within costs.load_limits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from gossamer.parallel.placement.bound import (
    BALANCE_PROOF,
    BYTES_PROOF,
    JOINT_PROOF,
    balance_bound,
    bytes_bound,
    joint_bound,
)
from gossamer.parallel.placement.costs import link_costs, load_limits, rank_loads
from gossamer.parallel.placement.eplb import without_replicas
from gossamer.parallel.placement.greedy import balanced
from gossamer.parallel.placement.local import search_joint, search_layers
from gossamer.parallel.placement.placement import Placement, contiguous, from_ranks
from gossamer.parallel.placement.problem import Problem
from gossamer.parallel.placement.score import score
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ILP_COLUMNS = 60_000
"""A larger program is refused: HiGHS would not get past its first relaxation."""
SMALL_COLUMNS, LAYER_S = 2_000, 1.0
"""Up to so many columns, or with so much time for the balance of a layer, `auto` tries HiGHS."""


@dataclass(frozen=True, eq=False, slots=True)
class Solved:
    """What a method answers."""

    rank_LE: Ints
    bound: float
    proof: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Until when, in seconds of perf_counter, and how near the bound is near enough."""

    until_s: float
    gap: float

    @property
    def left_s(self) -> float:
        return max(0.0, self.until_s - perf_counter())


def place(
    problem: Problem, method: str = "auto", time_limit_s: float = 10.0, gap: float = 1e-3
) -> Placement:
    """Solves the problem by one of METHODS.

    `time_limit_s` ends searches and proofs; a first placement and its score are made whatever it
    is. `gap` = (value - bound) / value at which a method may stop. Raises ValueError for an unknown
    method and where a method cannot take the problem.
    """
    if method not in METHODS:
        raise ValueError(f"placement method {method!r}: expected one of {', '.join(METHODS)}")
    if len(problem.sets[0].count_U) == 0 and problem.objective == "bytes":
        raise ValueError("a problem made of loads alone has no bytes; expected objective=balance")
    began_s = perf_counter()
    solved = METHODS[method](problem, Budget(began_s + time_limit_s, gap))
    placement = from_ranks(solved.rank_LE, problem.topology.ranks, problem.layers, method)
    value = score(problem, placement).value
    return replace(
        placement,
        objective=problem.name,
        value=value,
        bound=min(solved.bound, value),
        proof=solved.proof,
        time_s=perf_counter() - began_s,
    )


def _contiguous(problem: Problem, budget: Budget) -> Solved:
    table = contiguous(problem.layers, problem.experts, problem.topology.ranks).rank_LE
    return Solved(table, *_bound(problem, budget))


def _eplb(problem: Problem, budget: Budget) -> Solved:
    """Hierarchical with a group of experts for each node, or global if that is better balanced."""
    ranks = problem.topology.ranks
    tables = without_replicas(problem.load_LE, problem.topology.nodes, ranks)
    table = min(tables, key=lambda t: rank_loads(problem.load_LE, t, ranks).max(1).sum())
    return Solved(table, *_bound(problem, budget))


def _lpt(problem: Problem, budget: Budget) -> Solved:
    """LPT and pairwise swaps, without restarts."""
    ranks = problem.topology.ranks
    table = np.stack([balanced(load_E, ranks) for load_E in problem.load_LE])
    return Solved(table, *_bound(problem, budget))


def _local(problem: Problem, budget: Budget) -> Solved:
    """Balance: swaps from shaken starts. Bytes: local search from there and from contiguous."""
    return _search(problem, budget, _balanced(problem, budget))


def _search(problem: Problem, budget: Budget, balance_LE: Ints) -> Solved:
    bound, proof = _bound(problem, budget)
    if problem.objective == "balance":
        return Solved(balance_LE, bound, proof)
    even = contiguous(problem.layers, problem.experts, problem.topology.ranks).rank_LE
    search = search_joint if problem.dispatch == "resident" else search_layers
    limit_L = _limits(problem, balance_LE)
    return Solved(search(problem, limit_L, [balance_LE, even], budget.until_s), bound, proof)


def _ilp(problem: Problem, budget: Budget) -> Solved:
    """From what `local` finds in a third of the time."""
    from gossamer.parallel.placement import ilp

    columns = _ilp_columns(problem)
    if columns > ILP_COLUMNS:
        raise ValueError(
            f"method ilp: {columns} columns are more than {ILP_COLUMNS}; use local or auto"
        )
    ranks, count = problem.topology.ranks, len(problem.layers)
    third = Budget(perf_counter() + budget.left_s / 3, budget.gap)
    balance_LE = _balanced(problem, third)
    first, limit_L = _search(problem, third, balance_LE), _limits(problem, balance_LE)
    if problem.name == "bytes, resident":
        table, bound = ilp.joint_ilp(problem, limit_L, first.rank_LE, budget.left_s, budget.gap)
        return Solved(table, *_better(first, bound, "of HiGHS, within the load limits"))
    tables, bounds = [], []
    for layer, start_E in enumerate(first.rank_LE):
        share_s = budget.left_s / (count - layer)
        if problem.objective == "balance":
            load_E = problem.load_LE[layer]
            found, bound = ilp.balance_ilp(load_E, ranks, start_E, share_s, budget.gap)
        else:
            found, bound = ilp.bytes_ilp(
                problem, layer, int(limit_L[layer]), start_E, share_s, budget.gap
            )
        tables.append(found)
        bounds.append(bound)
    where = "of HiGHS" if problem.objective == "balance" else "of HiGHS, within the load limits"
    return Solved(np.stack(tables), *_better(first, float(sum(bounds)), where))


def _moetuner(problem: Problem, budget: Budget) -> Solved:
    """Equal clusters by load, then clusters to ranks by flow, in the exact form for equal links."""
    from gossamer.parallel.placement.moetuner import chained_ranks

    clusters_LE = _balanced(problem, budget)
    table = chained_ranks(clusters_LE, problem.flow_LEE, link_costs(problem))
    return Solved(table, *_bound(problem, budget))


def _auto(problem: Problem, budget: Budget) -> Solved:
    """Local; where that leaves a gap, HiGHS, if the program is small or each layer's has time."""
    has_time = problem.objective == "balance" and budget.left_s > LAYER_S * len(problem.layers)
    if _ilp_columns(problem) > (ILP_COLUMNS if has_time else SMALL_COLUMNS):
        return _local(problem, budget)
    solved = _local(problem, Budget(perf_counter() + budget.left_s / 2, budget.gap))
    placed = from_ranks(solved.rank_LE, problem.topology.ranks, problem.layers)
    value = score(problem, placed).value
    return solved if value - solved.bound <= budget.gap * value else _ilp(problem, budget)


METHODS: dict[str, Callable[[Problem, Budget], Solved]] = {
    "contiguous": _contiguous,
    "eplb": _eplb,
    "lpt": _lpt,
    "ilp": _ilp,
    "moetuner": _moetuner,
    "local": _local,
    "auto": _auto,
}


def _balanced(problem: Problem, budget: Budget) -> Ints:
    """LPT and swaps, no worse than EPLB. They are shaken as long as there is time for it: all where
    balance is the objective, a quarter where it only sets a limit, none where EPLB sets that."""
    ranks, count = problem.topology.ranks, len(problem.layers)
    share = 1.0 if problem.objective == "balance" else 0.0 if problem.slack is None else 0.25
    until_s = perf_counter() + budget.left_s * share
    tables = without_replicas(problem.load_LE, problem.topology.nodes, ranks)
    table = []
    for layer, load_E in enumerate(problem.load_LE):
        share_s = max(0.0, until_s - perf_counter()) / (count - layer)
        starts = [eplb_LE[layer] for eplb_LE in tables]
        table.append(balanced(load_E, ranks, budget.gap, perf_counter() + share_s, starts))
    return np.stack(table)


def _limits(problem: Problem, balance_LE: Ints) -> Ints:
    """Pairs that a rank may have when bytes are minimised; the balanced placement keeps to them."""
    busiest_L = rank_loads(problem.load_LE, balance_LE, problem.topology.ranks).max(1)
    return load_limits(problem, busiest_L)


def _bound(problem: Problem, budget: Budget) -> tuple[float, str]:
    """A bound on the value of every placement, whatever its balance, and what proves it."""
    if problem.objective == "balance":
        ranks = problem.topology.ranks
        return float(sum(balance_bound(load_E, ranks) for load_E in problem.load_LE)), BALANCE_PROOF
    if problem.dispatch == "resident":
        return joint_bound(problem), JOINT_PROOF
    until_s = perf_counter() + budget.left_s / 2

    def bound_of(layer: int) -> float:
        return bytes_bound(problem, layer, perf_counter() < until_s)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(bound_of, range(len(problem.layers)))), BYTES_PROOF


def _better(first: Solved, bound: float, where: str) -> tuple[float, str]:
    """The higher of two bounds, with its proof."""
    if bound > first.bound:
        return bound, f"branch and bound {where}"
    return first.bound, first.proof


def _ilp_columns(problem: Problem) -> int:
    """Of the largest program that `ilp` would hand to HiGHS."""
    experts, ranks = problem.experts, problem.topology.ranks
    if problem.objective == "balance":
        return experts * ranks
    if problem.dispatch == "resident":
        return len(problem.layers) * experts * ranks * (1 + ranks)
    sets = max(len(each.count_U) for each in problem.sets)
    return experts * ranks + sets * problem.topology.nodes
