"""Rollout batches: asked for ahead of time, scored, and packed for the policy loss.

The one idea: after version v is published, the batch of the update that may be `max_staleness`
versions later is asked for, to be sampled on v or newer. So staleness is bounded by when a batch is
asked for, and with 0 there is exactly one version that can make it; and no more than
max_staleness + 1 batches are ever asked for and not yet learned from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from gossamer.comm.rollout import Request, Sample
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.rl.groups import Group, choose_samples
from gossamer.trainer.rl.grpo import PolicyBatch, pack_samples
from gossamer.trainer.rl.prompts import (
    other_prompts,
    phase_seed,
    prompt_batch,
    request_id,
    requests_for,
)
from gossamer.trainer.rl.reward import RewardError, build_reward, exact_match, score_samples
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
        """Waits for the batch; samples in the order of its units.

        Prompts that the source has given up are left out, with all their samples.
        """
        ...

    def audit(self, version: int) -> dict[str, str]:
        """Brings every engine to `version`; state hash of the live weights by engine name."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStatistics:
    """Of one batch."""

    reward_mean: float
    """Of all that was sampled."""
    reward_std: float
    """Inside a group, mean over groups."""
    staleness_mean: float
    """Versions between the one that the batch's update starts from and a token's, mean."""
    staleness_max: int
    completion_tokens: int
    groups: int
    """Prompts that were sampled and scored."""
    groups_learned: int
    """Prompts that are learned from."""
    groups_lost: int
    """Prompts left out because no engine could answer them, or no reward was to be had."""
    refills: int
    """Rounds in which other prompts were asked (rl.refill_rounds)."""
    samples_learned: dict[int, list[int]]
    """The books: numbers of the samples that are learned from, by problem id."""
    score_s: float
    """What judging the samples took, of the time that the batch was waited for."""


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
        self._reward = build_reward(config)
        self._asked: dict[int, list[int]] = {}
        self._version = -1  # the newest that was published; nothing is asked before the first
        self._score_s = 0.0
        self._seed = config.seed
        self._unscored: RewardError | None = None

    def ask_ahead(self, version: int, steps: range, phase: int = 0) -> None:
        """`version` was published: asks for every batch that it entitles us to.

        steps: the updates that the phase has yet to make, from the one that starts on `version`.
        phase: how many grpo phases of the run went before.
        """
        rl, self._version = self._config.rl, version
        self._seed = phase_seed(self._config.seed, phase)
        for ahead in steps[: rl.max_staleness + 1]:
            if ahead not in self._asked:
                num_problems = len(self._problems.train)
                numbers = prompt_batch(self._seed, ahead, rl.prompts_per_step, num_problems)
                self._submit(str(ahead), ahead, numbers)
                self._asked[ahead] = numbers

    def collect(self, phase_step: int) -> tuple[PolicyBatch, RolloutStatistics]:
        """Waits for the batch of update `phase_step`, which starts from the newest version.

        Raises RuntimeError when nothing is left to learn from, and RewardError where the config
        says that an unscored prompt ends the run.
        """
        rl, numbers = self._config.rl, self._asked.pop(phase_step)
        self._score_s = 0.0
        groups = self._gather(str(phase_step), phase_step, numbers)
        refills = 0
        while refills < rl.refill_rounds and (others := self._others(phase_step, groups, numbers)):
            refills += 1
            batch, numbers = f"{phase_step}+{refills}", numbers + others
            self._submit(batch, phase_step, others)
            groups += self._gather(batch, phase_step, others)
        if not groups:
            why = f"; {self._unscored}" if self._unscored else ""
            raise RuntimeError(
                f"none of update {phase_step}'s prompts was answered and scored{why}"
            )
        chosen = groups
        if refills:
            mixed_groups = [group for group in groups if group.is_mixed]
            chosen = mixed_groups[: rl.prompts_per_step] or groups[:1]
        return self._pack(chosen, groups, lost=len(numbers) - len(groups), refills=refills)

    def _others(self, step: int, groups: list[Group], asked: list[int]) -> list[int]:
        """Training problems to ask in place of groups that teach nothing, in whole units."""
        rl = self._config.rl
        missing = rl.prompts_per_step - sum(group.is_mixed for group in groups)
        wanted = -(-missing // rl.prompts_per_unit) * rl.prompts_per_unit
        num_problems = len(self._problems.train)
        return other_prompts(self._seed, step, max(0, wanted), num_problems, asked)

    def _submit(self, batch: str, step: int, numbers: list[int]) -> None:
        """Asks for samples of the training problems of these numbers."""
        problems = [self._problems.train[number] for number in numbers]
        prompts = {p.problem_id: prompt_ids(self._tokenizer, p) for p in problems}
        units = requests_for(step, self._seed, prompts, self._config.rl)
        self._source.submit(batch, units, self._version)

    def _gather(self, batch: str, step: int, numbers: list[int]) -> list[Group]:
        """Waits for what was submitted, and scores it: the groups that are whole, in order."""
        rl = self._config.rl
        answered = {sample.request_id: sample for sample in self._source.collect(batch)}
        found: list[tuple[Problem, list[Sample]]] = []
        for problem in (self._problems.train[number] for number in numbers):
            ids = [request_id(step, problem.problem_id, g) for g in range(rl.samples_per_prompt)]
            if all(each in answered for each in ids):
                found.append((problem, [answered[each] for each in ids]))
        start_s = time.perf_counter()
        scores = score_samples(
            self._reward,
            self._tokenizer,
            [sample for _, samples in found for sample in samples],
            [problem for problem, samples in found for _ in samples],
            rl.reward_workers,
        )
        self._score_s += time.perf_counter() - start_s
        groups = []
        for place, (problem, samples) in enumerate(found):
            own = scores[place * rl.samples_per_prompt : (place + 1) * rl.samples_per_prompt]
            rewards = [score for score in own if not isinstance(score, RewardError)]
            if len(rewards) == len(own):
                groups.append(Group(problem, samples, rewards))
                continue
            self._unscored = next(score for score in own if isinstance(score, RewardError))
            if not rl.drop_unscored:
                raise self._unscored
        return groups

    def _pack(
        self, chosen: list[Group], groups: list[Group], lost: int, refills: int
    ) -> tuple[PolicyBatch, RolloutStatistics]:
        """The batch of the chosen groups, and the numbers of all of them."""
        rl, size = self._config.rl, self._config.rl.samples_per_prompt
        kept, advantages = choose_samples(torch.tensor([g.rewards for g in chosen]), rl)
        batch = pack_samples(
            [chosen[i // size].samples[i % size] for i in kept],
            [prompt_ids(self._tokenizer, chosen[i // size].problem) for i in kept],
            advantages,
            rl,
            self._version,
            self._rows_multiple,
        )
        learned: dict[int, list[int]] = {}
        for i in kept:
            learned.setdefault(chosen[i // size].problem.problem_id, []).append(i % size)
        samples = [sample for group in groups for sample in group.samples]
        spans = [span for sample in samples for span in sample.spans]
        tokens = sum(len(sample.token_ids) for sample in samples)
        behind = sum((self._version - span.version) * (span.stop - span.start) for span in spans)
        rewards_PG = torch.tensor([group.rewards for group in groups])
        return batch, RolloutStatistics(
            reward_mean=float(rewards_PG.mean()),
            reward_std=float(rewards_PG.std(dim=1, correction=0).mean()),
            staleness_mean=behind / max(1, tokens),
            staleness_max=max((self._version - span.version for span in spans), default=0),
            completion_tokens=tokens,
            groups=len(groups),
            groups_learned=len(learned),
            groups_lost=lost,
            refills=refills,
            samples_learned=learned,
            score_s=self._score_s,
        )

    def heldout_exact_match(self) -> tuple[float, int]:
        """Greedy exact match of engines at the newest version, and how many held-out problems.

        A problem that no engine could answer counts as answered wrong.
        """
        heldout, rl = self._problems.heldout, self._config.rl
        by_id = {f"heldout/{problem.problem_id}": problem for problem in heldout}
        requests = [
            Request(
                request_id=name,
                prompt_ids=tuple(prompt_ids(self._tokenizer, problem)),
                max_new_tokens=rl.max_new_tokens,
                temperature=0.0,
                key=(self._config.seed, problem.problem_id),
            )
            for name, problem in by_id.items()
        ]
        units = [requests[i : i + EVAL_UNIT] for i in range(0, len(requests), EVAL_UNIT)]
        batch = f"heldout-{self._version}"
        self._source.submit(batch, units, self._version)
        samples = self._source.collect(batch)
        asked = [by_id[sample.request_id] for sample in samples]
        right = [
            exact_match(self._tokenizer.decode(sample.token_ids), problem, sample.finished)
            for sample, problem in zip(samples, asked, strict=True)
        ]
        return sum(right) / len(heldout), len(heldout)

    def audit(self, version: int) -> dict[str, str]:
        """State hash of every engine's live weights at `version`."""
        return self._source.audit(version)
