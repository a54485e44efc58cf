"""Lower bounds on what any placement of a layer costs, each with the argument that proves it.

The one idea: a bound is worth printing when a reader can check it. Balance is bounded by counting
experts, bytes by relaxing the placement until the best of what is left is computed exactly.

Shapes: E experts, R ranks, N nodes, c = E / R experts of a rank.
"""

from __future__ import annotations

import numpy as np
from gossamer.parallel.placement.costs import Floats, linear_costs, once_cost, token_sets
from gossamer.parallel.placement.kernels import assign
from gossamer.parallel.placement.problem import Problem
from numpy.typing import NDArray

ROUNDING = 1e-9
"""Share by which a bound of floating-point sums is lowered."""
BALANCE_PROOF = "mean load; among the j*R+1 heaviest experts some rank has j+1, and c-1-j others"


def balance_bound(load_E: NDArray[np.int64], ranks: int) -> int:
    """No placement with c experts on each rank leaves less on its busiest rank.

    The mean, rounded up. And, for each j: of the j*R + 1 heaviest experts some rank holds j + 1,
    at the least the lightest j + 1 of these; its other c - 1 - j are at the least the lightest of
    all. (j = 0: the heaviest expert beside the c - 1 lightest.)
    """
    heavy_E = np.sort(load_E)[::-1]
    each = len(load_E) // ranks
    light_sums = np.concatenate([[0], np.cumsum(heavy_E[::-1])])
    best = -(-int(load_E.sum()) // ranks)
    for j in range(each):
        among = heavy_E[j * ranks - j : j * ranks + 1].sum() if j else heavy_E[0]
        best = max(best, int(among + light_sums[each - 1 - j]))
    return best


BYTES_PROOF = "a quadratic below the nodes of each token: eigenvalues, and an exact assignment"
JOINT_PROOF = "each pair of layers alone: singular values, or the largest flows that fit"


def bytes_bound(problem: Problem, layer: int, has_time: bool = True) -> float:
    """No placement of this layer costs less where results come home, whatever its balance.

    A token with s experts on a node goes there at least q(s) = (2 m s - s (s - 1)) / (m (m + 1))
    times: q(0) = 0, and q(s) <= 1 for whole s, m = 1, 2, ... So tokens cost at least a linear term
    and, for each node, minus y'B y, where y marks its experts and B counts co-activation among the
    tokens of other nodes. With y = 1/N + v, |v|^2 = E/N (1 - 1/N) and the v of the N nodes summing
    to 0, the sum of v'B v is at most E/N times the N - 1 largest eigenvalues of the mean B (on what
    is orthogonal to 1), plus each node's difference from that mean (Donath and Hoffman 1973). What
    is linear is minimised exactly, as an assignment. The most promising m and diagonal are taken.
    Without time only what was linear from the start is.
    """
    cost_ER, once = linear_costs(problem, layer), once_cost(problem)
    nodes, per_node = problem.topology.nodes, problem.topology.ranks_per_node
    best = _least(cost_ER)
    if not once or nodes == 1 or not has_time:
        return best * (1 - ROUNDING)
    off_NE, both_NEE, most = _off_node(problem, layer)
    flat_NE = both_NEE.sum(2)
    choices: list[tuple[float, Floats, Floats, float]] = []
    # y'y is known, so a diagonal may be added: none, or one that makes all rows' sums equal
    for diagonal_NE in (0 * flat_NE, flat_NE.mean(1, keepdims=True) - flat_NE)[:most]:
        row_NE = flat_NE + diagonal_NE
        shared = row_NE.sum() / nodes**2 - _shared_spread(both_NEE, diagonal_NE)
        for m in range(1, most + 1):
            scale = once / (m * (m + 1))
            linear_NE = 2 * m * off_NE + diagonal_NE - 2 / nodes * row_NE
            costs_ER = cost_ER + scale * np.repeat(linear_NE.T, per_node, axis=1)
            # placements at random cost the mean over ranks
            promise = costs_ER.mean(1).sum() + scale * shared
            choices.append((promise, costs_ER, diagonal_NE, scale))
    _, costs_ER, diagonal_NE, scale = max(choices, key=lambda choice: choice[0])
    constant = (flat_NE + diagonal_NE).sum() / nodes**2
    constant -= _shared_spread(both_NEE, diagonal_NE) + _own_spread(both_NEE, diagonal_NE)
    return max(best, _least(costs_ER) + scale * constant) * (1 - ROUNDING)


def joint_bound(problem: Problem) -> float:
    """No placement costs less where tokens stay at their experts, whatever its balance.

    Each pair of neighbouring layers alone: of its flow F at most sum(F) / G + c (the G - 1 largest
    singular values of F, on what is orthogonal to 1) stays within G groups of c experts, and at
    most what the c largest flows out of (into) each expert hold. Groups are ranks, and nodes.
    """
    near, far = problem.topology.costs
    ranks, nodes = problem.topology.ranks, problem.topology.nodes
    bound = 0.0
    for flow_EE in problem.flow_LEE:
        pair = near * (flow_EE.sum() - _most_within(flow_EE, ranks))
        pair += (far - near) * (flow_EE.sum() - _most_within(flow_EE, nodes)) * (nodes > 1)
        bound += 2 * problem.row_bytes * max(0.0, pair)
    return bound * (1 - ROUNDING)


def _most_within(flow_EE: NDArray[np.int64], groups: int) -> float:
    """At most so much flow stays inside groups of E / groups experts."""
    each = len(flow_EE) // groups
    values = np.linalg.svd(_without_mean(flow_EE.astype(float)), compute_uv=False)
    spectral = flow_EE.sum() / groups + each * values[: groups - 1].sum()
    largest = [np.sort(f, axis=1)[:, len(f) - each :].sum() for f in (flow_EE, flow_EE.T)]
    return float(min(spectral, *largest))


def _least(cost_ER: Floats) -> float:
    """Cost of the best assignment with c experts on each rank."""
    experts, ranks = cost_ER.shape
    if np.ptp(cost_ER, axis=1).max() == 0:
        return float(cost_ER[:, 0].sum())
    rank_E = assign(np.repeat(cost_ER, experts // ranks, axis=1)) // (experts // ranks)
    return float(cost_ER[np.arange(experts), rank_E].sum())


def _off_node(problem: Problem, layer: int) -> tuple[Floats, Floats, int]:
    """For each node, of the tokens it does not spare: those of each expert [N, E], and of each two
    [N, E, E], 0 on the diagonal; and the most experts of a token."""
    nodes, experts = problem.topology.nodes, problem.experts
    expert_UK, home_U, count_U = token_sets(problem, layer)
    own_NEE = np.zeros((nodes + 1, experts, experts))
    for home in np.unique(home_U):
        at = home_U == home
        chosen_UE = np.zeros((at.sum(), experts + 1))
        np.put_along_axis(chosen_UE, expert_UK[at], 1, axis=1)
        chosen_UE = chosen_UE[:, :experts]
        own_NEE[home] = (chosen_UE * count_U[at, None]).T @ chosen_UE
    off_NEE = own_NEE.sum(0) - own_NEE[:nodes]
    off_NE = np.einsum("nee->ne", off_NEE).copy()
    np.einsum("nee->ne", off_NEE)[...] = 0
    return off_NE, off_NEE, int((expert_UK >= 0).sum(1).max(initial=1))


def _shared_spread(both_NEE: Floats, diagonal_NE: Floats) -> float:
    """Sum over nodes of v'M v, M the mean matrix."""
    nodes, experts, _ = both_NEE.shape
    mean_EE = both_NEE.mean(0) + np.diag(diagonal_NE.mean(0))
    return experts / nodes * float(_eigenvalues(mean_EE)[: nodes - 1].sum())


def _own_spread(both_NEE: Floats, diagonal_NE: Floats) -> float:
    """Sum over nodes of v'(B - M) v."""
    nodes, experts, _ = both_NEE.shape
    if (both_NEE == both_NEE[0]).all() and (diagonal_NE == diagonal_NE[0]).all():
        return 0.0
    mean_EE, mean_E = both_NEE.mean(0), diagonal_NE.mean(0)
    own = [
        float(_eigenvalues(b_EE - mean_EE + np.diag(d_E - mean_E))[0])
        for b_EE, d_E in zip(both_NEE, diagonal_NE, strict=True)
    ]
    return experts / nodes * (1 - 1 / nodes) * sum(own)


def _eigenvalues(square_EE: Floats) -> Floats:
    """On what is orthogonal to 1, descending; the direction 1 itself comes last."""
    far_below = 1.0 + 2 * np.abs(square_EE).sum()
    values = np.linalg.eigvalsh(_without_mean(square_EE) - far_below / len(square_EE))
    return values[::-1]


def _without_mean(square_EE: Floats) -> Floats:
    """On what is orthogonal to 1."""
    rows = square_EE - square_EE.mean(0, keepdims=True)
    return rows - rows.mean(1, keepdims=True)
