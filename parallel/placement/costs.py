"""A layer's bytes as a sum: what an expert costs on a rank, and what a token costs on a node.

The one idea: where results come home, all but one thing is linear in the placement. Pairs that
travel one by one are counted by their source; only "once a node" looks at a token's experts
together. Solvers and bounds work on these two parts.

Shapes: E experts, R ranks, N nodes, U token sets.
"""

from __future__ import annotations

import numpy as np
from gossamer.parallel.placement.eplb import without_replicas
from gossamer.parallel.placement.problem import DISPATCHES, INDEX_BYTES, Problem
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def linear_costs(problem: Problem, layer: int) -> Floats:
    """cost_ER: what the pairs of expert e cost in this layer when it is on rank r."""
    ranks, per_node = problem.topology.ranks, problem.topology.ranks_per_node
    near, far = problem.topology.costs
    row, per_pair = problem.row_bytes, DISPATCHES[problem.dispatch].per_pair
    node_R, place_R = np.divmod(np.arange(ranks), per_node)
    across_RR = node_R[:, None] != node_R
    in_node_RR, across_bytes = place_R[:, None] != place_R, row * per_pair
    if problem.dispatch == "one_level":
        in_node_RR = ~across_RR & ~np.eye(ranks, dtype=bool)
    elif per_pair:
        across_bytes += INDEX_BYTES
    each_RR = far * across_bytes * across_RR + near * 4 * row * in_node_RR
    if problem.sources == "even":
        return np.outer(problem.load_LE[layer], each_RR.mean(0))
    return problem.source_LRE[layer].T @ each_RR


def once_cost(problem: Problem) -> float:
    """What each (token, node with an expert of its) costs, for the nodes that token_sets leaves."""
    cost = problem.topology.costs[1] * problem.row_bytes * DISPATCHES[problem.dispatch].per_node
    return cost * (1 - 1 / problem.topology.nodes) if problem.sources == "even" else cost


def token_sets(problem: Problem, layer: int) -> tuple[Ints, Ints, Ints]:
    """expert_UK, home_U and count_U: tokens that go together, and the node they need not travel to.

    Where sources are even no node is spared (home N), and once_cost is that much less.
    """
    sets, topology = problem.sets[layer], problem.topology
    home_U = sets.source_U // topology.ranks_per_node
    if problem.sources == "even":
        home_U = np.full_like(home_U, topology.nodes)
    rows = np.column_stack([home_U, sets.expert_UK])
    distinct_U, where_U = np.unique(rows, axis=0, return_inverse=True)
    count_U = np.bincount(where_U.ravel(), sets.count_U, len(distinct_U)).astype(np.int64)
    return np.ascontiguousarray(distinct_U[:, 1:]), distinct_U[:, 0].copy(), count_U


def once_rows(problem: Problem, sets: tuple[Ints, Ints, Ints], rank_E: Ints) -> int:
    """How often once_cost is paid by token_sets: (token, node) for the nodes they do not spare."""
    expert_UK, home_U, count_U = sets
    nodes = problem.topology.nodes
    node_E = np.append(rank_E // problem.topology.ranks_per_node, nodes + 1)  # -1: a spare slot
    goes_UN = np.zeros((len(home_U), nodes + 2), np.int64)
    np.put_along_axis(goes_UN, node_E[expert_UK], 1, axis=1)
    np.put_along_axis(goes_UN, home_U[:, None], 0, axis=1)
    return int((goes_UN[:, :nodes].sum(1) * count_U).sum())


def link_costs(problem: Problem) -> Floats:
    """cost_RR: of a row from rank to rank and its gradient back, where tokens stay (resident)."""
    ranks = problem.topology.ranks
    node_R = np.arange(ranks) // problem.topology.ranks_per_node
    near, far = problem.topology.costs
    cost_RR = np.where(node_R[:, None] == node_R, near, far) * (2.0 * problem.row_bytes)
    np.fill_diagonal(cost_RR, 0.0)
    return cost_RR


def load_limits(problem: Problem, busiest_L: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs a rank may have when bytes are minimised. `busiest_L`: of the best balance found."""
    if problem.slack is not None:
        return np.floor(busiest_L * (1 + problem.slack)).astype(np.int64)
    ranks = problem.topology.ranks
    tables = without_replicas(problem.load_LE, problem.topology.nodes, ranks)
    eplb_L = np.min([rank_loads(problem.load_LE, table, ranks).max(1) for table in tables], axis=0)
    return np.maximum(busiest_L, eplb_L)


def rank_loads(load_LE: Ints, rank_LE: Ints, ranks: int) -> Ints:
    """Pairs of each rank, [L, R]."""
    loads = [np.bincount(r, w, ranks) for r, w in zip(rank_LE, load_LE, strict=True)]
    return np.stack(loads).round().astype(np.int64)
