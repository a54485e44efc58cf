"""Small placement problems at random, and every placement there is of them."""

from functools import cache
from itertools import permutations, product

import numpy as np
from gossamer.parallel.placement.placement import from_ranks
from gossamer.parallel.placement.problem import Problem, Topology, build_problem
from gossamer.parallel.placement.score import score
from gossamer.parallel.placement.trace import Trace


def random_trace(
    seed: int, experts: int, slots: int, layers: int = 1, tokens: int = 14, world: int = 4
) -> Trace:
    """Skewed, with tokens that like the expert next to their first, and some spare slots."""
    random = np.random.default_rng(seed)
    liked_LTE = random.exponential(1, experts) * random.exponential(1, (layers, tokens, experts))
    first_LT = liked_LTE.argmax(2)
    np.put_along_axis(liked_LTE, (first_LT[:, :, None] + 1) % experts, 9, axis=2)
    expert_LTK = np.argsort(-liked_LTE, axis=2)[:, :, :slots].astype(np.int16)
    expert_LTK[:, ::5, 1:] = -1
    return Trace(
        expert_LTK=expert_LTK,
        step_T=np.zeros(tokens, np.int64),
        rank_T=np.sort(random.integers(0, world, tokens)).clip(max=world - 1),
        layers=tuple(range(layers)),
        num_experts=experts,
    )


SHAPES = ((4, 2, 1), (4, 2, 2), (6, 3, 1), (6, 2, 1), (4, 1, 2))
"""(experts, nodes, ranks of a node)"""


def random_problem(seed: int, shape: tuple[int, int, int], **more) -> Problem:  # noqa: ANN003
    experts, nodes, per_node = shape
    trace = random_trace(seed, experts, 1 + seed % 3, more.pop("layers", 1))
    topology = Topology(nodes=nodes, ranks_per_node=per_node, in_node_cost=more.pop("near", None))
    more.setdefault("sources", ("even", "seen")[seed % 2])
    return build_problem(trace, topology, row_bytes=8, **more)


@cache
def tables(experts: int, ranks: int) -> list[tuple[int, ...]]:
    return sorted(set(permutations([r for r in range(ranks) for _ in range(experts // ranks)])))


def every(problem: Problem):  # noqa: ANN201
    """(value, most pairs of a rank in each layer) of every placement."""
    ranks = problem.topology.ranks
    for rows in product(tables(problem.experts, ranks), repeat=len(problem.layers)):
        found = score(problem, from_ranks(np.array(rows), ranks, problem.layers))
        yield found.value, found.load_LR.max(1)
