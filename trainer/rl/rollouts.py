"""Rollout batches: asked for ahead of time, scored, and packed for the policy loss.

The one idea: after version v is published, the batch of the update that may be `max_staleness`
versions later is asked for, to be sampled on v or newer. So staleness is bounded by when a batch is
asked for, and with 0 there is exactly one version that can make it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from gossamer.comm.rollout import Request, Sample
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.import_path import resolve
from gossamer.trainer.rl.config import REWARDS, RLConfig
from gossamer.trainer.rl.grpo import PolicyBatch, group_advantages, pack_samples
from gossamer.trainer.rl.prompts import prompt_batch, requests_for
from gossamer.trainer.rl.reward import exact_match, score_samples
from gossamer.trainer.task import Problem, TaskProblems, prompt_ids
from gossamer.trainer.tokenizer import Tokenizer

EVAL_UNIT = 256
"""Held-out problems of one rollout unit."""


class RolloutSource(Protocol):
    """Whoever runs rollout engines for the trainer."""

    def submit(self, batch: str, units: list[list[Request]], oldest_version: int) -> None:
        """Queues a batch; each unit is run whole by one engine at oldest_version or newer."""
        ...

    def collect(self, batch: str) -> list[Sample]:
        """Waits for the batch; samples in the order of its units."""
        ...

    def audit(self, version: int) -> dict[str, str]:
        """Brings every engine to `version`; state hash of the live weights by engine name."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStatistics:
    """Of one batch."""

    reward_mean: float
    reward_std: float
    staleness_mean: float
    """Versions between the one that the batch's update starts from and a token's, mean."""
    completion_tokens: int


class RolloutBatches:
    """The trainer's side of rollouts (rank 0 only)."""

    def __init__(
        self,
        source: RolloutSource,
        tokenizer: Tokenizer,
        problems: TaskProblems,
        config: TrainConfig,
        rows_multiple: int,
    ) -> None:
        self._source, self._tokenizer, self._config = source, tokenizer, config
        self._problems, self._rows_multiple = problems, rows_multiple
        self._reward = resolve(config.rl.reward, REWARDS, "rl.reward")
        self._asked: dict[int, list[Problem]] = {}
        self._version = -1  # the newest that was published; nothing is asked before the first

    def ask_ahead(self, version: int, steps: range) -> None:
        """`version` was published: asks for every batch that it entitles us to.

        steps: the updates that the phase has yet to make, from the one that starts on `version`.
        """
        rl, self._version = self._config.rl, version
        for ahead in steps[: rl.max_staleness + 1]:
            if ahead in self._asked:
                continue
            train, seed = self._problems.train, self._config.seed
            numbers = prompt_batch(seed, ahead, rl.prompts_per_step, len(train))
            problems = [train[number] for number in numbers]
            prompts = {p.problem_id: prompt_ids(self._tokenizer, p) for p in problems}
            self._source.submit(str(ahead), requests_for(ahead, seed, prompts, rl), version)
            self._asked[ahead] = problems

    def collect(self, phase_step: int) -> tuple[PolicyBatch, RolloutStatistics]:
        """Waits for the batch of update `phase_step`, which starts from the newest version."""
        rl, problems = self._config.rl, self._asked.pop(phase_step)
        samples = self._source.collect(str(phase_step))
        answers = [problem.answer for problem in problems for _ in range(rl.samples_per_prompt)]
        scores = score_samples(self._reward, self._tokenizer, samples, answers)
        rewards_PG = torch.tensor(scores).view(len(problems), rl.samples_per_prompt)
        kept, advantages = choose_samples(rewards_PG, rl)
        prompts = [prompt_ids(self._tokenizer, problem) for problem in problems]
        batch = pack_samples(
            [samples[i] for i in kept],
            [prompts[i // rl.samples_per_prompt] for i in kept],
            advantages,
            rl.seq_len,
            self._rows_multiple,
        )
        tokens = sum(len(sample.token_ids) for sample in samples)
        behind = sum(
            (self._version - span.version) * (span.stop - span.start)
            for sample in samples
            for span in sample.spans
        )
        return batch, RolloutStatistics(
            reward_mean=float(rewards_PG.mean()),
            reward_std=float(rewards_PG.std(dim=1, correction=0).mean()),
            staleness_mean=behind / max(1, tokens),
            completion_tokens=tokens,
        )

    def heldout_exact_match(self) -> tuple[float, int]:
        """Greedy exact match of engines at the newest version, and how many held-out problems."""
        heldout, rl = self._problems.heldout, self._config.rl
        requests = [
            Request(
                request_id=f"heldout/{problem.problem_id}",
                prompt_ids=tuple(prompt_ids(self._tokenizer, problem)),
                max_new_tokens=rl.max_new_tokens,
                temperature=0.0,
                key=(self._config.seed, problem.problem_id),
            )
            for problem in heldout
        ]
        units = [requests[i : i + EVAL_UNIT] for i in range(0, len(requests), EVAL_UNIT)]
        batch = f"heldout-{self._version}"
        self._source.submit(batch, units, self._version)
        answers = [problem.answer for problem in heldout]
        samples = self._source.collect(batch)
        scores = score_samples(exact_match, self._tokenizer, samples, answers)
        return sum(scores) / len(heldout), len(heldout)

    def audit(self, version: int) -> dict[str, str]:
        """State hash of every engine's live weights at `version`."""
        return self._source.audit(version)


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
    advantage_PK = group_advantages(trained_PK[is_kept_P], rl.normalise_by_std)
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
