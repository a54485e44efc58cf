"""Which samples of a rollout batch are trained on, and with what advantage.

The one idea: a group is judged as a whole: what it teaches is how its samples differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gossamer.comm.rollout import Sample
from gossamer.trainer.rl.config import RLConfig
from gossamer.trainer.rl.grpo import group_advantages
from gossamer.trainer.task import Problem


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt."""

    problem: Problem
    samples: list[Sample]
    rewards: list[float]

    @property
    def is_mixed(self) -> bool:
        """Whether its samples earned different rewards."""
        rewards_G = torch.tensor(self.rewards)
        return bool(rewards_G.amax() != rewards_G.amin())


def choose_samples(rewards_PG: torch.Tensor, rl: RLConfig) -> tuple[list[int], list[float]]:
    """Numbers (p * G + g) and advantages of the samples to train on.

    Of each group those whose rewards differ most; of the groups, those whose rewards differ at all
    (the first group where none does: an update needs a batch).
    """
    num_prompts, group_size = rewards_PG.shape
    number_PK = most_different(rewards_PG, rl.train_samples_per_prompt or group_size)
    trained_PK = rewards_PG.gather(1, number_PK)
    is_kept_P = trained_PK.amax(dim=1) != trained_PK.amin(dim=1)
    if not rl.drop_constant_groups:
        is_kept_P[:] = True
    elif not is_kept_P.any():
        is_kept_P[0] = True
    number_PK = number_PK + group_size * torch.arange(num_prompts).unsqueeze(1)
    advantage_PK = group_advantages(
        trained_PK[is_kept_P],
        rl.normalise_by_std,
        leave_one_out=rl.baseline == "leave_one_out",
    )
    return number_PK[is_kept_P].flatten().tolist(), advantage_PK.flatten().tolist()


def most_different(rewards_PG: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Per group the num_kept samples whose rewards vary most, in the order of their numbers.

    They are always some of the lowest and some of the highest (PODS: Xu et al. 2025,
    arXiv:2504.13818); among equals the earlier sample is taken for low and the later for high.
    """
    order_PG = rewards_PG.argsort(dim=1, stable=True)
    group_size = rewards_PG.shape[1]
    places_CK = torch.tensor(
        [
            [*range(low), *range(group_size - num_kept + low, group_size)]
            for low in range(num_kept + 1)
        ]
    )
    candidates_PCK = rewards_PG.gather(1, order_PG)[:, places_CK]
    best_P = candidates_PCK.var(dim=-1, correction=0).argmax(dim=1)
    return order_PG.gather(1, places_CK[best_P]).sort(dim=1).values
