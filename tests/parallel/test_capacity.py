"""Capacity: who keeps a place, by hand and against a plain loop."""

import pytest
import torch
from gossamer.parallel.capacity import capacity_of, kept_pairs
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from hypothesis import given, settings
from hypothesis import strategies as st

NO, YES = False, True


def config(policy: str, factor: float = 1.0, seed: int = 0) -> DispatchConfig:
    return DispatchConfig(capacity_factor=factor, drop_policy=policy, drop_seed=seed)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("position", [[YES, YES], [YES, YES], [NO, YES], [NO, NO]]),
        ("probability", [[NO, YES], [YES, YES], [NO, NO], [YES, YES]]),
    ],
)
def test_a_case_by_hand(policy, expected):
    """4 tokens, 2 slots, 4 experts: 2 places each. All like 0; 1 is chosen by three of them."""
    expert_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])
    weight_TK = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.6, 0.4], [0.7, 0.41]])
    found = kept_pairs(expert_TK, weight_TK, 4, config(policy), step=0, layer=0)
    assert found.tolist() == expected


def plain(expert_TK, score_TK, num_experts, places) -> list[list[bool]]:
    tokens, slots = expert_TK.shape
    kept = [[False] * slots for _ in range(tokens)]
    for e in range(num_experts):
        queue = [(t, k) for t in range(tokens) for k in range(slots) if expert_TK[t, k] == e]
        for t, k in sorted(queue, key=lambda pair: -float(score_TK[pair]))[:places]:
            kept[t][k] = True
    return kept


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.sampled_from([0.3, 1.0, 1.5]), st.integers(0, 10**6))
def test_the_fast_way_is_the_plain_one(tokens, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(tokens, 5, generator=generator).topk(2).indices
    weight_TK = torch.randint(0, 4, (tokens, 2), generator=generator) / 4  # ties
    places = capacity_of(2 * tokens, 5, factor)
    for policy, score in (("probability", weight_TK), ("position", torch.zeros_like(weight_TK))):
        found = kept_pairs(expert_TK, weight_TK, 5, config(policy, factor), 0, 0)
        assert found.tolist() == plain(expert_TK, score, 5, places)


def test_random_selection_is_a_function_of_seed_step_and_layer():
    expert_TK, weight_TK = torch.zeros(400, 1, dtype=torch.int64), torch.ones(400, 1)

    def kept(step: int, layer: int, seed: int = 0) -> torch.Tensor:
        return kept_pairs(expert_TK, weight_TK, 4, config("random", 2.0, seed), step, layer)

    assert torch.equal(kept(1, 2), kept(1, 2))
    for other in (kept(2, 2), kept(1, 3), kept(2, 1), kept(1, 2, seed=1)):
        assert int(other.sum()) == 200
        assert 60 < int((kept(1, 2) & other).sum()) < 140  # 100 by chance
    share_late = kept(1, 2)[200:].float().mean()
    assert 0.3 < share_late < 0.7  # late tokens have their chance


@pytest.mark.parametrize("policy", ["position", "probability", "random"])
def test_padding_takes_no_real_token_s_place(policy):
    expert_TK, weight_TK = torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1)
    is_real_T = torch.arange(8) >= 4
    found = kept_pairs(expert_TK, weight_TK, 2, config(policy), 0, 0, is_real_T)
    assert found.flatten().tolist() == is_real_T.tolist()


def test_spare_slots_take_no_place():
    expert_TK, weight_TK = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    is_used_TK = torch.tensor([[NO, NO], [NO, YES], [YES, NO], [YES, YES]])
    found = kept_pairs(expert_TK, weight_TK, 4, config("position"), 0, 0, None, is_used_TK)
    assert found.tolist() == [[NO, NO], [NO, YES], [YES, NO], [NO, NO]]


def test_places_are_the_share_rounded_up():
    assert [capacity_of(n, 4, 1.0) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert capacity_of(40, 4, 1.1) == 11  # in floats 11.000000000000002


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"levels": 3}, "levels"),
        ({"levels": 2}, "ranks_per_node"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"capacity_factor": float("nan")}, "capacity_factor"),
        ({"drop_policy": "last"}, "drop_policy"),
        ({"drop_seed": -1}, "drop_seed"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=f"parallel.dispatch.*{name}"):
        DispatchConfig(**fields)


def test_expert_groups_that_straddle_nodes_are_refused():
    with pytest.raises(ValueError, match="one to divide the other"):
        ParallelConfig(expert=4, dispatch=DispatchConfig(ranks_per_node=3))
    ParallelConfig(expert=2, dispatch=DispatchConfig(ranks_per_node=8))
