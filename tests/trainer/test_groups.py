"""Which samples of a rollout batch are trained on, and with what advantage."""

from itertools import combinations

import pytest
import torch
from gossamer.trainer.rl.config import RLConfig
from gossamer.trainer.rl.groups import choose_samples, most_different
from gossamer.trainer.rl.grpo import group_advantages


def test_groups_that_all_earned_the_same_are_left_out():
    rewards_PG = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.3, 0.2]])
    kept, advantages = choose_samples(rewards_PG, RLConfig(samples_per_prompt=2))
    assert kept == [2, 3, 6, 7]
    assert advantages == pytest.approx([-1, 1, 1, -1], rel=1e-4)


def test_what_is_left_out_has_no_advantage():
    rewards_PG = torch.randint(0, 2, (50, 3), generator=torch.Generator().manual_seed(1)).float()
    kept, advantages = choose_samples(rewards_PG, RLConfig(samples_per_prompt=3))
    everything = group_advantages(rewards_PG, normalise_by_std=True).flatten()
    assert [everything[i].item() for i in kept] == pytest.approx(advantages)
    assert all((i in kept) == bool(everything[i].abs() > 1e-3) for i in range(150))


def test_a_batch_without_any_signal_keeps_one_group():
    config = RLConfig(samples_per_prompt=4)
    assert choose_samples(torch.ones(3, 4), config) == ([0, 1, 2, 3], [0.0] * 4)
    config = RLConfig(samples_per_prompt=4, drop_constant_groups=False)
    assert choose_samples(torch.ones(3, 4), config)[0] == list(range(12))


def test_a_few_of_a_group_by_hand():
    rewards_PG = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
    config = RLConfig(samples_per_prompt=6, train_samples_per_prompt=2)
    kept, advantages = choose_samples(rewards_PG, config)
    assert kept == [2, 5, 6, 11]
    assert advantages == pytest.approx([-1, 1, -1, 1], rel=1e-4)


@pytest.mark.parametrize("num_kept", [2, 3, 4, 6])
def test_no_other_choice_varies_more(num_kept):
    generator = torch.Generator().manual_seed(num_kept)
    for binary in (True, False):
        rewards_PG = torch.rand(20, 6, generator=generator)
        rewards_PG = (rewards_PG > 0.6).float() if binary else rewards_PG
        chosen_PK = rewards_PG.gather(1, most_different(rewards_PG, num_kept))
        for rewards_G, chosen_K in zip(rewards_PG, chosen_PK, strict=True):
            every = torch.tensor(list(combinations(rewards_G.tolist(), num_kept)))
            best = every.var(dim=1, correction=0).max()
            assert chosen_K.var(correction=0) == pytest.approx(best.item(), abs=1e-6)
