"""EPLB, DeepSeek's load balancer: greedy packing, replicas of the busiest, in numpy.

The one idea: groups of experts are packed onto nodes, the busiest experts of a node get the spare
slots as replicas, and replicas are packed onto the node's ranks; each packing takes the heaviest
first and the lightest open bin. Sums and quotients are float32 in its own order, so that ties fall
as they do in deepseek-ai/EPLB (eplb.py @ d52c72d).

Shapes: L layers, E experts, P slots, B bins, X most replicas of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False, slots=True)
class Replicated:
    """Slots that may hold an expert more than once; slot p is on rank p // (P / ranks)."""

    slots_LP: Ints
    """Logical expert of each slot."""
    replica_LEX: Ints
    """Slots of each expert, -1 where it has fewer than X."""
    count_LE: Ints
    """How many slots hold the expert."""

    def rank_loads(self, load_LE: ArrayLike, ranks: int) -> NDArray[np.float64]:
        """[L, ranks] when an expert's replicas share its load evenly."""
        share_LE = np.asarray(load_LE) / self.count_LE
        share_LP = np.take_along_axis(share_LE, self.slots_LP, axis=1)
        return share_LP.reshape(len(share_LP), ranks, -1).sum(2)


def rebalance(load_LE: ArrayLike, slots: int, groups: int, nodes: int, ranks: int) -> Replicated:
    """What `rebalance_experts` answers: hierarchical when `nodes` divides `groups`, else global.

    Raises ValueError where the sizes do not divide.
    """
    load_LE = np.asarray(load_LE, dtype=np.float32)
    layers, experts = load_LE.shape
    if groups % nodes:
        groups = nodes = 1
    for what, of, by in (
        (f"{experts} experts", experts, groups),
        (f"{ranks} ranks", ranks, nodes),
        (f"{slots} slots", slots, ranks),
    ):
        if of % by:
            raise ValueError(f"eplb: {what} do not divide by {by}")
    if slots < experts:
        raise ValueError(f"eplb: {slots} slots do not hold {experts} experts")
    size, on_node, rank_slots = experts // groups, experts // nodes, slots // ranks

    load_LG = load_LE.reshape(layers, groups, size).sum(2, dtype=np.float32)
    node_LG, place_LG = _pack(load_LG, nodes)
    first_LG = (node_LG * (groups // nodes) + place_LG) * size
    place_LE = (first_LG[:, :, None] + np.arange(size)).reshape(layers, experts)
    expert_LE = np.argsort(place_LE, axis=1)  # the expert at each place: nodes one after another

    load_Me = np.take_along_axis(load_LE, expert_LE, axis=1).reshape(-1, on_node)
    local_MP, copy_MP, count_Me = _replicate(load_Me, slots // nodes)
    share_Me: Floats = np.divide(load_Me, count_Me, dtype=np.float32)
    load_MP = np.take_along_axis(share_Me, local_MP, axis=1)
    rank_MP, place_MP = _pack(load_MP, ranks // nodes)
    order_MP = np.argsort(rank_MP * rank_slots + place_MP, axis=1)

    local_LNP = np.take_along_axis(local_MP, order_MP, axis=1).reshape(layers, nodes, -1)
    at_LP = (local_LNP + on_node * np.arange(nodes)[:, None]).reshape(layers, slots)
    slots_LP = np.take_along_axis(expert_LE, at_LP, axis=1)
    copy_LP = np.take_along_axis(copy_MP, order_MP, axis=1).reshape(layers, slots)
    count_LE = np.take_along_axis(count_Me.reshape(layers, experts), place_LE, axis=1)
    replica_LEX = np.full((layers, experts, count_LE.max()), -1)
    replica_LEX[np.arange(layers)[:, None], slots_LP, copy_LP] = np.arange(slots)
    return Replicated(slots_LP, replica_LEX, count_LE)


def without_replicas(load_LE: ArrayLike, nodes: int, ranks: int) -> list[Ints]:
    """rank_LE of EPLB at equal slots: hierarchical with one group of experts a node, and global."""
    load_LE = np.asarray(load_LE)
    experts = load_LE.shape[1]
    answers = [rebalance(load_LE, experts, n, n, ranks) for n in (nodes, 1)]
    return [np.argsort(a.slots_LP, axis=1) // (experts // ranks) for a in answers]


def _pack(load_MX: Floats, bins: int) -> tuple[Ints, Ints]:
    """Bin and place in it of each item, as many items in each bin."""
    rows, items = load_MX.shape
    room = items // bins
    if room == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    order_MX = np.argsort(-load_MX, axis=1, kind="stable")
    bin_MX, place_MX = np.empty((rows, items), np.int64), np.empty((rows, items), np.int64)
    for row, load_X in enumerate(load_MX):
        held_B, count_B = np.zeros(bins, np.float32), np.zeros(bins, np.int64)
        for item in order_MX[row]:
            lightest = int(np.where(count_B < room, held_B, np.inf).argmin())
            bin_MX[row, item], place_MX[row, item] = lightest, count_B[lightest]
            held_B[lightest] += load_X[item]
            count_B[lightest] += 1
    return bin_MX, place_MX


def _replicate(load_Me: Floats, slots: int) -> tuple[Ints, Ints, Ints]:
    """Item and number of each copy, [M, slots]; copies of each item. The busiest copy is halved."""
    rows, items = load_Me.shape
    item_MP, copy_MP = np.tile(np.arange(slots), (rows, 1)), np.zeros((rows, slots), np.int64)
    count_Me, every = np.ones((rows, items), np.int64), np.arange(rows)
    for slot in range(items, slots):
        busiest_M = (load_Me / count_Me.astype(np.float32)).argmax(1)
        item_MP[:, slot], copy_MP[:, slot] = busiest_M, count_Me[every, busiest_M]
        count_Me[every, busiest_M] += 1
    return item_MP, copy_MP, count_Me
