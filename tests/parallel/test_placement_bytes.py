"""The bytes of a placement are those that the dispatcher counts, in a world of four ranks."""

import numpy as np
import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from gossamer.parallel.dims import build_dims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.parallel.placement.placement import contiguous, from_ranks
from gossamer.parallel.placement.problem import Topology, build_problem
from gossamer.parallel.placement.score import count_bytes, score
from gossamer.parallel.placement.trace import Trace

D, E, K, STEPS = 6, 8, 3, 2
TOKENS = (9, 14, 7, 5)
LAYOUTS = {"2 nodes x 2": (1, 4, 2), "4 nodes x 1": (1, 4, 1), "1 node": (1, 4, 4)}
LAYOUTS["2 replicas"] = (2, 2, 1)
"""(data, expert, ranks_per_node)"""


def trace() -> Trace:
    random = np.random.default_rng(3)
    total = STEPS * sum(TOKENS)
    scores_LTE = random.random((2, total, E)) - np.arange(E) / 10
    return Trace(
        expert_LTK=np.argsort(-scores_LTE, axis=2)[:, :, :K].astype(np.int16),
        step_T=np.arange(STEPS).repeat(sum(TOKENS)),
        rank_T=np.tile(np.arange(4).repeat(TOKENS), STEPS),
        layers=(0, 1),
        num_experts=E,
    )


def placements(ranks: int):
    shuffled_LE = [np.random.default_rng(n).permutation(E) % ranks for n in (1, 2)]
    return {"contiguous": contiguous(2, E, ranks), "shuffled": from_ranks(shuffled_LE, ranks)}


def sent(layout: str, levels: int, which: str) -> list[int]:
    """Bytes of this rank inside its node and across, over all steps and layers."""
    data, expert, per_node = LAYOUTS[layout]
    config = DispatchConfig(levels=levels, ranks_per_node=per_node)
    dims = build_dims(ParallelConfig(data=data, expert=expert, dispatch=config))
    dispatcher, given = Dispatcher(dims, E), trace()
    for step in range(STEPS):
        for expert_LTK, slots_S in zip(
            given.expert_LTK, placements(expert)[which].slots_LS, strict=True
        ):
            mine_T = (given.rank_T == dims.rank) & (given.step_T == step)
            physical_TK = torch.from_numpy(np.argsort(slots_S)[expert_LTK[mine_T]])
            x_TD = torch.ones(len(physical_TK), D, requires_grad=True)
            x_RD, _, route = dispatcher.dispatch(x_TD, physical_TK)
            weight_TK = torch.ones(physical_TK.shape)
            dispatcher.combine(x_RD * 2, weight_TK, route).sum().backward()
    traffic = dispatcher.traffic.take()
    kinds = ("forward", "backward", "index")
    return [sum(getattr(traffic, f"{k}_{link}") for k in kinds) for link in ("in_node", "across")]


CASES = [(n, levels, w) for n in LAYOUTS for levels in (1, 2) for w in ("contiguous", "shuffled")]


def every_case() -> dict:
    return {f"{case}": torch.tensor(sent(*case)) for case in CASES}


@pytest.fixture(scope="module")
def counted() -> dict:
    ranks = run_world(every_case, 4)
    return {name: sum(rank[name] for rank in ranks).tolist() for name in ranks[0]}


@pytest.mark.parametrize("case", CASES)
def test_bytes_foretold_are_bytes_counted(counted, case):
    layout, levels, which = case
    data, expert, per_node = LAYOUTS[layout]
    topology = Topology(nodes=expert // per_node, ranks_per_node=per_node)
    dispatch = ("one_level", "two_level")[levels - 1]
    problem = build_problem(trace(), topology, dispatch=dispatch, row_bytes=4 * D)
    found = score(problem, placements(expert)[which])
    counts = [n * data * STEPS * 2 for n in count_bytes(topology, E, dispatch)]
    assert found.in_node_bytes + counts[0] == counted[str(case)][0]
    assert found.across_bytes + counts[1] == counted[str(case)][1]
    assert found.bytes_LRR.sum() == found.in_node_bytes + found.across_bytes


def test_what_is_counted_of_a_trace():
    given = trace()
    problem = build_problem(given, Topology(nodes=2, ranks_per_node=2))
    for layer, expert_TK in enumerate(given.expert_LTK):
        tokens = [set(row) for row in expert_TK.tolist()]
        for e in range(E):
            assert problem.load_LE[layer, e] == sum(e in t for t in tokens)
            for f in range(E):
                both = sum(e in t and f in t for t in tokens) if e != f else 0
                assert problem.together_LEE[layer, e, f] == both
        for rank in range(4):
            mine = expert_TK[given.rank_T == rank].flatten()
            assert problem.source_LRE[layer, rank].tolist() == np.bincount(mine, None, E).tolist()
    here, after = given.expert_LTK
    flow = sum(int(2 in a and 5 in b) for a, b in zip(here.tolist(), after.tolist(), strict=True))
    assert problem.flow_LEE[0, 2, 5] == flow and problem.steps == STEPS


def test_a_trace_of_another_world_is_dealt_out_evenly():
    problem = build_problem(trace(), Topology(nodes=1, ranks_per_node=8))
    assert np.ptp(problem.source_LRE.sum(2)) <= K * STEPS


def test_tokens_that_stay_cost_their_flows():
    problem = build_problem(
        trace(), Topology(nodes=2, ranks_per_node=1), dispatch="resident", objective="bytes"
    )
    placement = placements(2)["shuffled"]
    here, after = trace().expert_LTK
    rank_LE = placement.rank_LE
    rows = (rank_LE[0][here][:, :, None] != rank_LE[1][after][:, None, :]).sum()
    assert score(problem, placement).value == 2 * rows


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"objective": "speed"}, "problem.objective is speed"),
        ({"dispatch": "three"}, "problem.dispatch is three"),
        ({"slack": -0.1}, "problem.slack is -0.1"),
        ({"expert_bytes": 10, "memory_bytes": 39}, "problem.memory_bytes is 39; 2 experts of 2"),
    ],
)
def test_a_wrong_problem_is_refused(changed, reason):
    with pytest.raises(ValueError, match=reason):
        build_problem(trace(), Topology(nodes=2, ranks_per_node=2), **changed)
    with pytest.raises(ValueError, match="8 experts do not divide among 3 ranks"):
        build_problem(trace(), Topology(nodes=3, ranks_per_node=1))
