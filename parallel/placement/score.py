"""What a placement costs on a problem: rank loads, and the bytes its dispatcher sends.

The one idea: bytes are counted from the tokens' own sets of experts, trip by trip, as
parallel/two_level.py and dispatch.py send them: for those two the sums are the dispatcher's own
counters (without padding, and without the few bytes of counts, which no placement changes).

Shapes: as in problem.py; N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gossamer.parallel.placement.costs import (
    linear_costs,
    once_cost,
    once_rows,
    rank_loads,
    token_sets,
)
from gossamer.parallel.placement.placement import Placement
from gossamer.parallel.placement.problem import DISPATCHES, INDEX_BYTES, Problem, Topology
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Score:
    """Over the whole trace: forward and backward of every layer."""

    load_LR: NDArray[np.int64]
    """(token, slot) pairs of each rank."""
    bytes_LRR: NDArray[np.int64]
    """From rank to rank; 0 on the diagonal."""
    in_node_bytes: int
    across_bytes: int
    value: float
    """Of the problem's objective: the busiest ranks' pairs, summed over layers, or the bytes times
    the cost of their link, as expected when sources are even."""

    @property
    def max_over_mean(self) -> float:
        """Busiest rank over the mean, all layers in turn: sum of maxima over sum of means."""
        return float(self.load_LR.max(1).sum() / max(self.load_LR.mean(1).sum(), 1e-12))


def score(problem: Problem, placement: Placement) -> Score:
    """Raises ValueError when the placement is for other layers, experts or ranks."""
    if (placement.layers, placement.experts, placement.ranks) != (
        problem.layers,
        problem.experts,
        problem.topology.ranks,
    ):
        raise ValueError(
            f"the placement has layers {placement.layers}, {placement.experts} experts and"
            f" {placement.ranks} ranks; expected {problem.layers}, {problem.experts} and"
            f" {problem.topology.ranks}"
        )
    rank_LE = placement.rank_LE
    load_LR = rank_loads(problem.load_LE, rank_LE, placement.ranks)
    if problem.dispatch == "resident":
        bytes_LRR = _resident_bytes(problem, rank_LE)
    else:
        bytes_LRR = np.stack(
            [layer_bytes(problem, layer, rank_E) for layer, rank_E in enumerate(rank_LE)]
        )
    total_RR = bytes_LRR.sum(0)
    node_R = np.arange(placement.ranks) // problem.topology.ranks_per_node
    is_across_RR = node_R[:, None] != node_R
    across = int(total_RR[is_across_RR].sum())
    in_node = int(total_RR.sum()) - across
    near, far = problem.topology.costs
    value = float(load_LR.max(1).sum())
    if (
        problem.objective == "bytes"
        and problem.sources == "even"
        and problem.dispatch != "resident"
    ):
        value = sum(_expected_cost(problem, layer, r) for layer, r in enumerate(rank_LE))
    elif problem.objective == "bytes":
        value = near * in_node + far * across
    return Score(
        load_LR=load_LR,
        bytes_LRR=bytes_LRR,
        in_node_bytes=in_node,
        across_bytes=across,
        value=value,
    )


def _expected_cost(problem: Problem, layer: int, rank_E: NDArray[np.int64]) -> float:
    """Cost of a layer's bytes when every rank is as likely to hold a token."""
    linear = linear_costs(problem, layer)[np.arange(len(rank_E)), rank_E].sum()
    once = once_cost(problem)
    return float(linear) + once * (once and once_rows(problem, token_sets(problem, layer), rank_E))


def layer_bytes(problem: Problem, layer: int, rank_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes from rank to rank that one layer sends where results come home, [R, R]."""
    ranks, per_node = problem.topology.ranks, problem.topology.ranks_per_node
    is_on_ER = rank_E[:, None] == np.arange(ranks)
    pairs_RR = problem.source_LRE[layer] @ is_on_ER.astype(np.int64)
    row, trips = problem.row_bytes, DISPATCHES[problem.dispatch]
    if problem.dispatch == "one_level":
        bytes_RR = 2 * row * (pairs_RR + pairs_RR.T)
    else:
        # a relay has the sender's place on the owner's node: sender -> relay -> owner, and back
        source_R = np.arange(ranks)
        relay_RN = np.arange(problem.topology.nodes) * per_node + (source_R % per_node)[:, None]
        relay_RR = relay_RN[:, source_R // per_node]
        once_RN = tokens_to_nodes(problem, layer, rank_E)
        each_RN = pairs_RR.reshape(ranks, -1, per_node).sum(2)
        positions_RN = INDEX_BYTES * each_RN * (trips.per_pair > 0)
        # of an odd number of trips, pairs come home once more, tokens go out once more
        out_RN = trips.per_pair // 2 * each_RN + (trips.per_node + 1) // 2 * once_RN
        home_RN = (trips.per_pair + 1) // 2 * each_RN + trips.per_node // 2 * once_RN
        bytes_RR = np.zeros((ranks, ranks), np.int64)
        np.add.at(bytes_RR, (source_R[:, None], relay_RN), row * out_RN + positions_RN)
        np.add.at(bytes_RR, (relay_RN, source_R[:, None]), row * home_RN)
        np.add.at(bytes_RR, (relay_RR, source_R[None]), 2 * row * pairs_RR)
        np.add.at(bytes_RR, (source_R[None], relay_RR), 2 * row * pairs_RR)
    np.fill_diagonal(bytes_RR, 0)
    return bytes_RR


def tokens_to_nodes(problem: Problem, layer: int, rank_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each source with an expert on each node, [R, N]."""
    sets, topology = problem.sets[layer], problem.topology
    node_E = np.append(rank_E // topology.ranks_per_node, topology.nodes)
    goes_UN = np.zeros((len(sets.source_U), topology.nodes + 1), np.int64)
    np.put_along_axis(goes_UN, node_E[sets.expert_UK], 1, axis=1)
    tokens_RN = np.zeros((topology.ranks, topology.nodes), np.int64)
    np.add.at(tokens_RN, sets.source_U, goes_UN[:, :-1] * sets.count_U[:, None])
    return tokens_RN


def _resident_bytes(problem: Problem, rank_LE: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows from the rank of a token's expert to that of its next one, and gradients back."""
    ranks = problem.topology.ranks
    bytes_LRR = np.zeros((len(rank_LE), ranks, ranks), np.int64)
    for layer, flow_EE in enumerate(problem.flow_LEE):
        here_ER = (rank_LE[layer][:, None] == np.arange(ranks)).astype(np.int64)
        next_ER = (rank_LE[layer + 1][:, None] == np.arange(ranks)).astype(np.int64)
        rows_RR = here_ER.T @ flow_EE @ next_ER
        bytes_LRR[layer] = problem.row_bytes * (rows_RR + rows_RR.T)
        np.fill_diagonal(bytes_LRR[layer], 0)
    return bytes_LRR


def count_bytes(topology: Topology, experts: int, dispatch: str) -> tuple[int, int]:
    """Bytes of counts, inside nodes and across, of one call of dispatch on every rank of a group;
    the same for every placement. For one_level and two_level."""
    ranks, per_node, nodes = topology.ranks, topology.ranks_per_node, topology.nodes
    local = experts // ranks
    if dispatch == "one_level" or nodes == 1:
        return 8 * local * (per_node - 1) * ranks, 8 * local * (ranks - per_node) * ranks
    across = 8 * (nodes - 1) * (per_node * local + 1) * ranks
    return 8 * (per_node - 1) * nodes * local * ranks, across
