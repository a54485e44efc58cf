"""The solvers' inner loops, compiled by numba.

The one idea: a swap of two experts keeps every rank's number of experts, so a search by swaps never
leaves the placements that training can use. Loads are integers: no sum drifts.

Shapes: E experts, R ranks, N nodes, K slots, U distinct token sets.
"""

from __future__ import annotations

import numpy as np
from numba import njit

compiled = njit(cache=True, nogil=True, error_model="numpy")


@compiled
def pack_heaviest_first(load_E, order_E, ranks):
    """LPT with c experts a rank: each, in the given order, to the lightest rank with room."""
    experts = len(load_E)
    each = experts // ranks
    rank_E = np.empty(experts, np.int64)
    load_R, count_R = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for e in order_E:
        best = -1
        for r in range(ranks):
            if count_R[r] < each and (best < 0 or load_R[r] < load_R[best]):
                best = r
        rank_E[e] = best
        load_R[best] += load_E[e]
        count_R[best] += 1
    return rank_E


@compiled
def swap_down(load_E, rank_E, ranks, target):
    """Swaps an expert of the busiest rank for one of another, as long as that lowers the higher of
    the two and no swap does so more; in place. Ends at `target`. Returns the busiest load."""
    experts = len(load_E)
    each = experts // ranks
    load_R = np.zeros(ranks, np.int64)
    held_RC = np.empty((ranks, each), np.int64)
    count_R = np.zeros(ranks, np.int64)
    for e in range(experts):
        r = rank_E[e]
        held_RC[r, count_R[r]] = e
        count_R[r] += 1
        load_R[r] += load_E[e]
    while True:
        top = load_R.argmax()
        if load_R[top] <= target:
            break
        best, best_i, best_r, best_j = load_R[top], -1, -1, -1
        for r in range(ranks):
            if r == top:
                continue
            for i in range(each):
                for j in range(each):
                    shift = load_E[held_RC[top, i]] - load_E[held_RC[r, j]]
                    if shift <= 0:
                        continue
                    higher = max(load_R[top] - shift, load_R[r] + shift)
                    if higher < best:
                        best, best_i, best_r, best_j = higher, i, r, j
        if best_i < 0:
            break
        a, b = held_RC[top, best_i], held_RC[best_r, best_j]
        held_RC[top, best_i], held_RC[best_r, best_j] = b, a
        rank_E[a], rank_E[b] = best_r, top
        shift = load_E[a] - load_E[b]
        load_R[top] -= shift
        load_R[best_r] += shift
    return load_R.max()


@compiled
def assign(cost_EC):
    """The column of each row that makes the sum of costs smallest, one a row and one a column:
    shortest augmenting paths (Hungarian method), exact up to rounding."""
    n = cost_EC.shape[0]
    row_price, col_price = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, np.int64)  # 0 = free; rows and columns count from 1
    came_from = np.zeros(n + 1, np.int64)
    for row in range(1, n + 1):
        row_of[0] = row
        col = 0
        least = np.full(n + 1, np.inf)
        used = np.zeros(n + 1, np.bool_)
        while True:
            used[col] = True
            at, step, nearest = row_of[col], np.inf, 0
            for c in range(1, n + 1):
                if used[c]:
                    continue
                reduced = cost_EC[at - 1, c - 1] - row_price[at] - col_price[c]
                if reduced < least[c]:
                    least[c] = reduced
                    came_from[c] = col
                if least[c] < step:
                    step, nearest = least[c], c
            for c in range(n + 1):
                if used[c]:
                    row_price[row_of[c]] += step
                    col_price[c] -= step
                else:
                    least[c] -= step
            col = nearest
            if row_of[col] == 0:
                break
        while col:
            row_of[col] = row_of[came_from[col]]
            col = came_from[col]
    column_E = np.empty(n, np.int64)
    for c in range(1, n + 1):
        column_E[row_of[c] - 1] = c - 1
    return column_E


@compiled
def swap_linear(cost_ER, rank_E, load_E, limit):
    """Swaps two experts as long as that lowers the sum of cost_ER[e, rank of e] and leaves both
    ranks at most `limit`; in place. The first swap that helps is taken. Returns what was saved."""
    experts, ranks = cost_ER.shape
    load_R = np.zeros(ranks, np.int64)
    for e in range(experts):
        load_R[rank_E[e]] += load_E[e]
    saved, improved = 0.0, True
    while improved:
        improved = False
        for a in range(experts):
            for b in range(a):
                p, q = rank_E[a], rank_E[b]
                if p == q:
                    continue
                delta = cost_ER[a, q] + cost_ER[b, p] - cost_ER[a, p] - cost_ER[b, q]
                if delta >= -1e-9 * (1 + abs(cost_ER[a, p]) + abs(cost_ER[b, q])):
                    continue
                shift = load_E[a] - load_E[b]
                if load_R[p] - shift > limit or load_R[q] + shift > limit:
                    continue
                rank_E[a], rank_E[b] = q, p
                load_R[p] -= shift
                load_R[q] += shift
                saved -= delta
                improved = True
    return saved


@compiled
def _leave_and_enter(u_list, other, experts_UK, home_U, count_U, on_UN, away, there):
    """Change in tokens sent, when an expert of these sets moves from node `away` to `there` and
    `other` the opposite way."""
    change = 0
    for u in u_list:
        if on_UN[u, there] == 0 and home_U[u] != there:
            change += count_U[u]
        if on_UN[u, away] == 1 and home_U[u] != away:
            shared = False
            for k in range(experts_UK.shape[1]):
                if experts_UK[u, k] == other:
                    shared = True
            if not shared:
                change -= count_U[u]
    return change


@compiled
def anneal(problem, rank_E, hot, cold, proposals, seed):
    """Simulated annealing by swaps that respect the load limit; `rank_E` gets the best found.

    `problem`: cost_ER, cost of a (token, other node), load_E, limit, ranks per node, experts_UK,
    home_U (node), count_U, and each expert's sets: set_P[first_E[e] : first_E[e + 1]]. `hot` and
    `cold`: first and last temperature, in units of cost. Returns by how much the best is better.
    """
    cost_ER, once, load_E, limit, per_node, experts_UK, home_U, count_U, first_E, set_P = problem
    experts, ranks = cost_ER.shape
    np.random.seed(seed)
    load_R = np.zeros(ranks, np.int64)
    for e in range(experts):
        load_R[rank_E[e]] += load_E[e]
    on_UN = np.zeros((len(home_U), ranks // per_node), np.int16)
    for e in range(experts):
        for u in set_P[first_E[e] : first_E[e + 1]]:
            on_UN[u, rank_E[e] // per_node] += 1
    now_E = rank_E.copy()
    value, best = 0.0, 0.0
    cooling = (cold / hot) ** (1.0 / max(proposals, 1))
    heat = hot
    for _ in range(proposals):
        heat *= cooling
        a, b = np.random.randint(experts), np.random.randint(experts)
        p, q = now_E[a], now_E[b]
        shift = load_E[a] - load_E[b]
        if p == q or load_R[p] - shift > limit or load_R[q] + shift > limit:
            continue
        delta = cost_ER[a, q] + cost_ER[b, p] - cost_ER[a, p] - cost_ER[b, q]
        m, n = p // per_node, q // per_node
        sets_a, sets_b = set_P[first_E[a] : first_E[a + 1]], set_P[first_E[b] : first_E[b + 1]]
        if m != n and once > 0:
            delta += once * (
                _leave_and_enter(sets_a, b, experts_UK, home_U, count_U, on_UN, m, n)
                + _leave_and_enter(sets_b, a, experts_UK, home_U, count_U, on_UN, n, m)
            )
        if delta > 0 and np.random.random() >= np.exp(-delta / heat):
            continue
        now_E[a], now_E[b] = q, p
        load_R[p] -= shift
        load_R[q] += shift
        if m != n:
            for u in sets_a:
                on_UN[u, m] -= 1
                on_UN[u, n] += 1
            for u in sets_b:
                on_UN[u, n] -= 1
                on_UN[u, m] += 1
        value += delta
        if value < best - 1e-9 * abs(best):
            best = value
            rank_E[:] = now_E
    return -best
