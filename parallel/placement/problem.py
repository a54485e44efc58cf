"""The placement problem as pure data: who is loaded how much, who goes with whom, over what links.

The one idea: what a placement costs depends on the dispatcher. Where results come home after every
layer, cross-layer affinity saves no byte: balance, a token's experts on one node (if the dispatcher
sends a token to a node once) and nearness to the source do. Where tokens stay at their experts, the
flows between layers count. So a problem names its dispatcher, and bytes are those it would send.

Shapes: L layers, T tokens, K slots, E experts, R ranks of the expert group, U distinct (source,
set of experts) of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gossamer.parallel.placement.trace import Trace
from numpy.typing import NDArray

OBJECTIVES = ("balance", "bytes")
SOURCES = ("even", "seen")
INDEX_BYTES = 4
"""Of a pair's position, which crosses beside the rows (two_level)."""


@dataclass(frozen=True, slots=True)
class Trips:
    """Rows across nodes that a dispatcher sends in a training step, forward and backward."""

    per_node: int
    """For each (token, other node with an expert of its)."""
    per_pair: int
    """For each (token, slot) whose expert is on another node."""
    who: str


DISPATCHES = {
    "one_level": Trips(0, 4, "dispatch.levels=1, Megatron's alltoall: source locality only"),
    "two_level": Trips(1, 3, "dispatch.levels=2: a token crosses to a node once, results do not"),
    "summed": Trips(4, 0, "DeepEP, HierMoE: once a node each way, results summed there; not here"),
    "resident": Trips(0, 0, "ExFlow, MoETuner: tokens stay at their experts; not here"),
}
"""What makes an objective of bytes real."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Ranks of one expert group on nodes; node n has the ranks n * ranks_per_node and up."""

    nodes: int
    ranks_per_node: int
    across_cost: float = 1.0
    """Of a byte between nodes."""
    in_node_cost: float | None = None
    """Of a byte between ranks of a node. None = 0; 1 where there is but one node."""

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"topology.{name} is {getattr(self, name)}; expected at least 1")
        near, far = self.costs
        if near < 0 or far < near and self.nodes > 1:
            raise ValueError(
                f"topology: expected costs 0 <= in_node_cost={near} <= across_cost={far}"
            )

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def costs(self) -> tuple[float, float]:
        """Of a byte inside a node, and across."""
        near = self.in_node_cost
        return (float(self.nodes == 1) if near is None else near), self.across_cost


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class TokenSets:
    """A layer's tokens, those of one source and the same experts counted together."""

    expert_UK: NDArray[np.int16]
    """Ascending, spare slots (-1) first."""
    source_U: NDArray[np.int64]
    """Rank of the expert group that holds the tokens."""
    count_U: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Problem:
    """Everything a solver sees. Counts are over the whole trace, of `steps` steps."""

    topology: Topology
    layers: tuple[int, ...]
    load_LE: NDArray[np.int64]
    """(token, slot) pairs of each expert."""
    source_LRE: NDArray[np.int64]
    """The same by the rank that holds the token: source locality."""
    together_LEE: NDArray[np.int64]
    """Co-activation: tokens that have both experts; 0 on the diagonal."""
    flow_LEE: NDArray[np.int64]
    """L - 1 of them: (slot, slot) pairs of a token with e in a layer and f in the next."""
    sets: tuple[TokenSets, ...]
    steps: int = 1
    row_bytes: int = 1
    """Of a hidden state: hidden size x bytes of an element."""
    objective: str = "balance"
    dispatch: str = "two_level"
    sources: str = "even"
    """Whose tokens the objective counts: `even` = any rank is as likely to hold a token, as with
    shuffled data; `seen` = where the trace had them: noise, unless data is dealt by kind."""
    slack: float | None = None
    """When bytes are minimised, a rank may have this share more pairs than the best balance found
    leaves on the busiest; None = as many as EPLB leaves there."""
    expert_bytes: int = 0
    """Training state of an expert: weights, masters, moments."""
    memory_bytes: int | None = None
    """For the experts of a rank; None = no limit."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"problem.objective is {self.objective}; expected one of {OBJECTIVES}")
        if self.dispatch not in DISPATCHES:
            raise ValueError(
                f"problem.dispatch is {self.dispatch}; expected one of {tuple(DISPATCHES)}"
            )
        if self.sources not in SOURCES:
            raise ValueError(f"problem.sources is {self.sources}; expected one of {SOURCES}")
        if self.slack is not None and self.slack < 0:
            raise ValueError(f"problem.slack is {self.slack}; expected 0 or more")
        layers, experts = self.load_LE.shape
        if experts % self.topology.ranks:
            raise ValueError(
                f"{experts} experts do not divide among {self.topology.ranks} ranks; a training"
                " placement has as many on each"
            )
        need = layers * self.slots_per_rank * self.expert_bytes
        if self.memory_bytes is not None and need > self.memory_bytes:
            raise ValueError(
                f"problem.memory_bytes is {self.memory_bytes}; {self.slots_per_rank} experts of"
                f" {layers} layers on a rank need {need}"
            )

    @property
    def experts(self) -> int:
        return self.load_LE.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.experts // self.topology.ranks

    @property
    def name(self) -> str:
        """What is minimised, for whom."""
        return "balance" if self.objective == "balance" else f"bytes, {self.dispatch}"


def balance_problem(
    load_LE: NDArray[np.int64], topology: Topology, layers: tuple[int, ...] | None = None
) -> Problem:
    """The problem of balance alone, from what each expert was given: running counters suffice."""
    load_LE = np.asarray(load_LE, dtype=np.int64)
    count, experts = load_LE.shape
    nothing = TokenSets(
        expert_UK=np.zeros((0, 1), np.int16),
        source_U=np.zeros(0, np.int64),
        count_U=np.zeros(0, np.int64),
    )
    return Problem(
        topology=topology,
        layers=tuple(range(count)) if layers is None else layers,
        load_LE=load_LE,
        source_LRE=np.zeros((count, topology.ranks, experts), np.int64),
        together_LEE=np.zeros((count, experts, experts), np.int64),
        flow_LEE=np.zeros((count - 1, experts, experts), np.int64),
        sets=(nothing,) * count,
    )


def build_problem(
    trace: Trace,
    topology: Topology,
    *,
    objective: str = "balance",
    dispatch: str = "two_level",
    sources: str = "even",
    row_bytes: int = 1,
    slack: float | None = None,
    expert_bytes: int = 0,
    memory_bytes: int | None = None,
) -> Problem:
    """Counts what a trace holds. Raises ValueError when the experts do not divide among the ranks.

    Tokens of a world with a multiple of the group's ranks are where they were; any other trace is
    dealt out evenly, step by step, in its order.
    """
    source_T = _sources(trace, topology.ranks)
    experts, ranks = trace.num_experts, topology.ranks
    loads, by_source, together, flows, sets = [], [], [], [], []
    before_TE: NDArray[np.float32] | None = None
    for expert_TK in trace.expert_LTK:
        chosen_TE = _chosen(expert_TK, experts)
        has_T, has_K = (expert_TK >= 0).nonzero()
        where = source_T[has_T] * experts + expert_TK[has_T, has_K]
        source_RE = np.bincount(where, minlength=ranks * experts).reshape(ranks, experts)
        both_EE = (chosen_TE.T @ chosen_TE).round().astype(np.int64)
        np.fill_diagonal(both_EE, 0)
        if before_TE is not None:
            flows.append((before_TE.T @ chosen_TE).round().astype(np.int64))
        before_TE = chosen_TE
        loads.append(source_RE.sum(0))
        by_source.append(source_RE)
        together.append(both_EE)
        sets.append(_token_sets(expert_TK, source_T))
    return Problem(
        topology=topology,
        layers=trace.layers,
        load_LE=np.stack(loads),
        source_LRE=np.stack(by_source),
        together_LEE=np.stack(together),
        flow_LEE=np.stack(flows) if flows else np.zeros((0, experts, experts), np.int64),
        sets=tuple(sets),
        steps=len(trace.steps),
        row_bytes=row_bytes,
        objective=objective,
        dispatch=dispatch,
        sources=sources,
        slack=slack,
        expert_bytes=expert_bytes,
        memory_bytes=memory_bytes,
    )


def _sources(trace: Trace, ranks: int) -> NDArray[np.int64]:
    """The rank of the expert group that holds each token."""
    world = int(trace.rank_T.max()) + 1
    if world % ranks == 0:
        return trace.rank_T % ranks
    _, first_T, size_T = np.unique(trace.step_T, return_index=True, return_counts=True)
    place_T = np.arange(len(trace.step_T)) - np.repeat(first_T, size_T)
    return place_T * ranks // np.repeat(size_T, size_T)


def _chosen(expert_TK: NDArray[np.int16], experts: int) -> NDArray[np.float32]:
    """1 where a token has an expert; float32 is exact up to 2^24 tokens, and has a fast product."""
    chosen_TE = np.zeros((len(expert_TK), experts + 1), np.float32)
    np.put_along_axis(chosen_TE, expert_TK.astype(np.int64), 1, axis=1)  # -1: the last column
    return np.ascontiguousarray(chosen_TE[:, :experts])


def _token_sets(expert_TK: NDArray[np.int16], source_T: NDArray[np.int64]) -> TokenSets:
    rows = np.column_stack([source_T, np.sort(expert_TK, axis=1)])
    distinct_U, count_U = np.unique(rows, axis=0, return_counts=True)
    return TokenSets(
        expert_UK=distinct_U[:, 1:].astype(np.int16), source_U=distinct_U[:, 0], count_U=count_U
    )
