"""Placements by integer programming (HiGHS): balance, bytes of one layer, flows of all layers.

The one idea: the solver starts from what the heuristics found and is given their bound as a cut, so
what is left to it is the proof; when its time is up, what it has proven is the bound. Ranks (and
nodes) are alike, so experts are sorted and the i-th may only use the first i of them.

Shapes: L layers, E experts, R ranks, N nodes, U token sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import highspy
import numpy as np
from gossamer.parallel.placement.bound import balance_bound
from gossamer.parallel.placement.costs import (
    Floats,
    Ints,
    linear_costs,
    link_costs,
    once_cost,
    token_sets,
)
from gossamer.parallel.placement.problem import Problem
from numpy.typing import ArrayLike

INFINITY = highspy.kHighsInf


@dataclass(frozen=True, eq=False, slots=True)
class Solution:
    """Columns of the best solution known, its value, and below what value there is none."""

    x: Floats
    value: float
    bound: float
    is_optimal: bool


class Model:
    """A mixed-integer program, minimised: columns, then rows."""

    def __init__(self) -> None:
        self._highs = highspy.Highs()
        self._highs.silent()
        self.columns = 0

    def add_columns(
        self, shape: tuple[int, ...], cost: ArrayLike, upper: ArrayLike = 1.0, whole: bool = True
    ) -> Ints:
        """Columns from 0 to `upper`; their numbers, in this shape."""
        count = math.prod(shape)
        cost, upper = (np.broadcast_to(a, shape).astype(float).ravel() for a in (cost, upper))
        number = np.arange(self.columns, self.columns + count)
        none = np.zeros(0, np.int32)
        self._highs.addCols(count, cost, np.zeros(count), upper, 0, none, none, np.zeros(0))
        if whole:
            kind = np.full(count, highspy.HighsVarType.kInteger)
            self._highs.changeColsIntegrality(count, number.astype(np.int32), kind)
        self.columns += count
        return number.reshape(shape)

    def add_rows(
        self, columns_MX: Ints, factors: ArrayLike, lower: ArrayLike, upper: ArrayLike
    ) -> None:
        """lower <= sum of factors x columns <= upper, for each of M rows."""
        rows, width = columns_MX.shape
        factors_MX = np.broadcast_to(factors, columns_MX.shape).astype(float)
        low_M, high_M = (np.broadcast_to(a, rows).astype(float) for a in (lower, upper))
        starts = np.arange(rows, dtype=np.int32) * width
        index = columns_MX.astype(np.int32).ravel()
        self._highs.addRows(
            *(rows, low_M, high_M, rows * width, starts, index),
            np.ascontiguousarray(factors_MX).ravel(),
        )

    def solve(self, start: Floats, time_limit_s: float, gap: float, step: float = 0.0) -> Solution:
        """From a start that satisfies all rows. `step`: values are whole multiples of it; a bound
        is rounded up to one."""
        highs = self._highs
        highs.setOptionValue("time_limit", max(time_limit_s, 0.01))
        highs.setOptionValue("threads", 1)
        highs.setOptionValue("mip_rel_gap", gap)
        if step:
            highs.setOptionValue("mip_abs_gap", 0.999 * step)
        solution = highspy.HighsSolution()
        solution.col_value = list(start)
        highs.setSolution(solution)
        highs.run()
        info, status = highs.getInfo(), highs.getModelStatus()
        is_optimal = status == highspy.HighsModelStatus.kOptimal
        x = np.array(highs.getSolution().col_value)
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return Solution(start, math.inf, -math.inf, False)
        value, bound = info.objective_function_value, info.mip_dual_bound
        if step and math.isfinite(bound):
            bound = step * math.ceil(bound / step - 1e-6)
        return Solution(x, value, min(bound, value), is_optimal)


def balance_ilp(
    load_E: Ints, ranks: int, start_E: Ints, time_limit_s: float, gap: float
) -> tuple[Ints, int]:
    """The rank of each expert, and below what busiest load there is no placement.

    min T with sum of loads <= T on every rank, c experts on each, T at least the bound by counting.
    """
    heavy_E = np.argsort(-load_E, kind="stable")
    start_E = _by_first_use(start_E[heavy_E])
    bound, busiest = (
        balance_bound(load_E, ranks),
        np.bincount(start_E, load_E[heavy_E], ranks).max(),
    )
    if busiest <= bound * (1 + gap):
        return _unsorted(start_E, heavy_E), bound
    model = Model()
    x_ER = model.add_columns((len(load_E), ranks), 0.0, _triangle(len(load_E), ranks))
    most = model.add_columns((1,), 1.0, float(busiest), whole=False)
    _hold(model, x_ER)
    with_most_RX = np.column_stack([x_ER.T, np.full(ranks, most[0])])
    factors = np.append(load_E[heavy_E], -1.0)
    model.add_rows(with_most_RX, factors, -INFINITY, 0.0)
    model.add_rows(most[None], 1.0, float(bound), INFINITY)
    start = np.append(_marked(start_E, ranks).ravel(), float(busiest))
    found = model.solve(start, time_limit_s, gap, step=1.0)
    rank_E = found.x[x_ER].argmax(1)
    return _unsorted(rank_E, heavy_E), max(bound, int(found.bound) if found.bound > 0 else 0)


def bytes_ilp(
    problem: Problem, layer: int, limit: int, start_E: Ints, time_limit_s: float, gap: float
) -> tuple[Ints, float]:
    """The rank of each expert, and below what cost no placement within the load limit is.

    z[u, n] = 1 when tokens of set u go to node n: at least y[e, n] for each of their experts.
    """
    ranks, per_node = problem.topology.ranks, problem.topology.ranks_per_node
    nodes, once = problem.topology.nodes, once_cost(problem)
    load_E = problem.load_LE[layer]
    model = Model()
    x_ER = model.add_columns((problem.experts, ranks), linear_costs(problem, layer))
    _hold(model, x_ER)
    model.add_rows(x_ER.T, load_E, -INFINITY, float(limit))
    start = [_marked(start_E, ranks).ravel()]
    if once and nodes > 1:
        expert_UK, home_U, count_U = token_sets(problem, layer)
        home_UN = home_U[:, None] == np.arange(nodes)
        cost_UN = once * count_U[:, None] * ~home_UN
        z_UN = model.add_columns(home_UN.shape, cost_UN, whole=False)
        node_E = start_E // per_node
        goes_UN = np.zeros(home_UN.shape)
        for k in range(expert_UK.shape[1]):
            u = (expert_UK[:, k] >= 0).nonzero()[0]
            expert_u = expert_UK[u, k]
            goes_UN[u, node_E[expert_u]] = 1
            for node in range(nodes):
                on_node = x_ER[:, node * per_node : (node + 1) * per_node]
                rows = np.column_stack([z_UN[u, node], on_node[expert_u]])
                model.add_rows(rows, [1.0] + [-1.0] * per_node, 0.0, INFINITY)
        # a node has room for so many experts; whoever has more goes to more nodes
        need_U = np.ceil((expert_UK >= 0).sum(1) / (problem.experts // nodes))
        model.add_rows(z_UN, 1.0, need_U, INFINITY)
        start.append(goes_UN.ravel())
    found = model.solve(np.concatenate(start), time_limit_s, gap)
    return found.x[x_ER].argmax(1), found.bound


def joint_ilp(
    problem: Problem, limit_L: Ints, start_LE: Ints, time_limit_s: float, gap: float
) -> tuple[Ints, float]:
    """rank_LE, and below what cost no placement within the load limits is, where tokens stay.

    f[l, r, s, e] = flow of expert e of layer l from rank r to experts on rank s in the next.
    """
    ranks, experts = problem.topology.ranks, problem.experts
    link_RR = link_costs(problem)
    model = Model()
    x_LER = model.add_columns((len(start_LE), experts, ranks), 0.0)
    start = [_marked(start_E, ranks).ravel() for start_E in start_LE]
    for layer, x_ER in enumerate(x_LER):
        _hold(model, x_ER)
        model.add_rows(x_ER.T, problem.load_LE[layer], -INFINITY, float(limit_L[layer]))
    first_RX = x_LER[0]
    if (link_RR[~np.eye(ranks, dtype=bool)] == link_RR[0, -1]).all():  # any rank may be the first
        model.add_rows(first_RX[:1, 1:].T, 1.0, 0.0, 0.0)
        relabel_R = (np.arange(ranks) - start_LE[0][0]) % ranks
        start = [_marked(relabel_R[start_E], ranks).ravel() for start_E in start_LE]
        start_LE = relabel_R[start_LE]
    for layer, flow_EE in enumerate(problem.flow_LEE):
        total_E = flow_EE.sum(1)
        f_ERR = model.add_columns(
            (experts, ranks, ranks), link_RR[None], total_E[:, None, None], whole=False
        )
        # what leaves an expert is where the expert is, and arrives where the next ones are
        out = np.concatenate([f_ERR, x_LER[layer][:, :, None]], axis=2).reshape(-1, ranks + 1)
        away = np.repeat(-total_E, ranks)[:, None]
        model.add_rows(out, np.column_stack([np.ones((len(out), ranks)), away]), 0.0, 0.0)
        arrive = np.concatenate(
            [
                f_ERR.transpose(0, 2, 1),
                np.broadcast_to(x_LER[layer + 1].T, (experts, ranks, experts)),
            ],
            axis=2,
        ).reshape(experts * ranks, -1)
        into = np.repeat(-flow_EE, ranks, axis=0)
        model.add_rows(arrive, np.column_stack([np.ones((experts * ranks, ranks)), into]), 0.0, 0.0)
        flows = np.zeros((experts, ranks, ranks))
        to_ER = flow_EE @ _marked(start_LE[layer + 1], ranks)
        flows[np.arange(experts), start_LE[layer]] = to_ER
        start.append(flows.ravel())
    found = model.solve(np.concatenate(start), time_limit_s, gap)
    return found.x[x_LER].argmax(2), found.bound


def _hold(model: Model, x_ER: Ints) -> None:
    """Each expert on one rank, as many on each."""
    model.add_rows(x_ER, 1.0, 1.0, 1.0)
    each = x_ER.shape[0] // x_ER.shape[1]
    model.add_rows(np.ascontiguousarray(x_ER.T), 1.0, float(each), float(each))


def _marked(rank_E: Ints, ranks: int) -> Floats:
    return (rank_E[:, None] == np.arange(ranks)).astype(float)


def _triangle(experts: int, ranks: int) -> Floats:
    """Upper bounds: expert i on the first i + 1 ranks."""
    return (np.arange(ranks) <= np.arange(experts)[:, None]).astype(float)


def _by_first_use(rank_E: Ints) -> Ints:
    """The same placement with ranks numbered as they come."""
    _, first_R, label_E = np.unique(rank_E, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_R))[label_E]


def _unsorted(rank_E: Ints, order_E: Ints) -> Ints:
    back_E = np.empty_like(rank_E)
    back_E[order_E] = rank_E
    return back_E
