"""Which samples of a rollout batch are trained on."""

import torch
from gossamer.trainer.rl.grpo import group_advantages
from gossamer.trainer.rl.rollouts import informative_samples


def test_groups_that_all_earned_the_same_are_left_out():
    rewards_PG = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.3, 0.2]])
    assert informative_samples(rewards_PG) == [2, 3, 6, 7]


def test_what_is_left_out_has_no_advantage():
    rewards_PG = torch.randint(0, 2, (50, 3), generator=torch.Generator().manual_seed(1)).float()
    kept = set(informative_samples(rewards_PG))
    advantages = group_advantages(rewards_PG, normalise_by_std=True).flatten()
    assert all((i in kept) == bool(advantages[i].abs() > 1e-3) for i in range(150))
    assert 0 < len(kept) < 150


def test_a_batch_without_any_signal_keeps_one_group():
    assert informative_samples(torch.ones(3, 4)) == [0, 1, 2, 3]
