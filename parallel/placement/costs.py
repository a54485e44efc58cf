"""A layer's bytes as a sum: what an expert costs on a rank, and what a token costs on a node.

The one idea: where results come home, all but one thing is linear in the placement. Pairs that
travel one by one are counted by their source; only "once a node" looks at a token's experts
together. Solvers and bounds work on these two parts.

Shapes: E experts, R ranks, N nodes, U token sets.
"""

from __future__ import annotations

import numpy as np
from gossamer.parallel.placement.eplb import rebalance
from gossamer.parallel.placement.problem import DISPATCHES, Problem
from gossamer.parallel.placement.score import INDEX_BYTES
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
    return problem.source_LRE[layer].T @ each_RR


def once_cost(problem: Problem) -> float:
    """What each (token, other node with an expert of its) costs."""
    return problem.topology.costs[1] * problem.row_bytes * DISPATCHES[problem.dispatch].per_node


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
    ranks, nodes = problem.topology.ranks, problem.topology.nodes
    eplb_L = [
        rebalance(problem.load_LE, problem.experts, groups, nodes, ranks)
        .rank_loads(problem.load_LE, ranks)
        .max(1)
        for groups in {1, nodes}
    ]
    return np.maximum(busiest_L, np.min(eplb_L, axis=0).round().astype(np.int64))
