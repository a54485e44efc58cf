"""MoETuner's two stages: experts to clusters by load, clusters to ranks by flow between layers.

The one idea: as published (arXiv 2502.06643) both are integer programs, clusters may have any size,
and no bound holds for the two together. In the form that training can use clusters are equal;
then, on links that are all alike and for the sum of bytes, stage two falls apart into one
assignment problem a pair of layers, each independent of the others because ranks may be renamed
layer by layer: exact in milliseconds. Real only where tokens stay at their experts.

Shapes: L layers, E experts, C clusters, R = C ranks.
"""

from __future__ import annotations

import numpy as np
from gossamer.parallel.placement.costs import Floats
from gossamer.parallel.placement.ilp import INFINITY, Model
from gossamer.parallel.placement.kernels import assign
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def published_clusters(load_E: Ints, clusters: int, time_limit_s: float, gap: float) -> Ints:
    """Stage one as published: min sum |load of cluster - mean|, none empty; sizes are free."""
    experts, mean = len(load_E), float(load_E.sum()) / clusters
    model = Model()
    x_EC = model.add_columns((experts, clusters), 0.0)
    off_C = model.add_columns((clusters,), 1.0, INFINITY, whole=False)
    model.add_rows(x_EC, 1.0, 1.0, 1.0)
    model.add_rows(np.ascontiguousarray(x_EC.T), 1.0, 1.0, INFINITY)
    with_off = np.column_stack([x_EC.T, off_C])
    model.add_rows(with_off, np.append(load_E, 1.0), mean, INFINITY)
    model.add_rows(with_off, np.append(load_E, -1.0), -INFINITY, mean)
    start_E = np.arange(experts) % clusters
    marked_EC = (start_E[:, None] == np.arange(clusters)).astype(float)
    off = np.abs(np.bincount(start_E, load_E, clusters) - mean)
    found = model.solve(np.concatenate([marked_EC.ravel(), off]), time_limit_s, gap)
    return found.x[x_EC].argmax(1)


def published_ranks(
    flow_LCC: NDArray, cost_RR: Floats, time_limit_s: float, gap: float
) -> tuple[Ints, float]:
    """Stage two as published: the rank of each layer's clusters [L, C], and the value's bound.

    min sum over layers of the largest flow x cost between two ranks. `flow_LCC`: L - 1 of them.
    """
    pairs, clusters, _ = flow_LCC.shape
    model = Model()
    y_LCR = model.add_columns((pairs + 1, clusters, clusters), 0.0)
    for y_CR in y_LCR:
        model.add_rows(y_CR, 1.0, 1.0, 1.0)
        model.add_rows(np.ascontiguousarray(y_CR.T), 1.0, 1.0, 1.0)
    most_L = model.add_columns((pairs,), 1.0, INFINITY, whole=False)
    start = [np.tile(np.eye(clusters), (pairs + 1, 1, 1)).ravel()]
    start.append((flow_LCC * cost_RR).max((1, 2)) if pairs else np.zeros(0))
    for layer, flow_CC in enumerate(flow_LCC):
        c, d, r, s = (a.ravel() for a in np.indices((clusters,) * 4))
        weight = flow_CC[c, d] * cost_RR[r, s]
        keep = weight > 0
        c, d, r, s, weight = (a[keep] for a in (c, d, r, s, weight))
        most = np.full(len(c), most_L[layer])
        columns = np.column_stack([y_LCR[layer][c, r], y_LCR[layer + 1][d, s], most])
        factors = np.column_stack([weight, weight, -np.ones(len(c))])
        model.add_rows(columns, factors, -INFINITY, weight)
    found = model.solve(np.concatenate(start), time_limit_s, gap)
    return found.x[y_LCR].argmax(2), found.bound


def chained_ranks(cluster_LE: Ints, flow_LEE: NDArray, cost_RR: Floats) -> Ints:
    """rank_LE: clusters of each layer assigned to the ranks where their tokens come from.

    Exact for the given clusters when all of cost_RR off its diagonal is alike.
    """
    ranks = len(cost_RR)
    rank_LE = cluster_LE.copy()
    for layer, flow_EE in enumerate(flow_LEE):
        in_ER = np.eye(ranks)[cluster_LE[layer + 1]]
        # flow from each rank of the layer before into each cluster
        from_RC = np.eye(ranks)[rank_LE[layer]].T @ flow_EE @ in_ER
        rank_C = assign(np.ascontiguousarray((cost_RR.T @ from_RC).T))
        rank_LE[layer + 1] = rank_C[cluster_LE[layer + 1]]
    return rank_LE
