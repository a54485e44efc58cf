"""Rewards: how good a completion is, judged by a program.

The one idea: a reward sees text, not tokens, so it knows no tokenizer and no engine. An outsider's
is named by import path (`rl.reward: my_package.rewards:digits_right`): a function, or a class whose
instances are called alike and that is built with the TrainConfig.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from gossamer.comm.rollout import Sample
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.import_path import resolve
from gossamer.trainer.rl.config import REWARDS
from gossamer.trainer.task import Problem
from gossamer.trainer.tokenizer import Tokenizer


class RewardError(RuntimeError):
    """A completion that could not be judged, through no fault of its own."""


class Reward(Protocol):
    """A pure function of what was asked for and what came."""

    def __call__(self, completion: str, problem: Problem, finished: bool) -> float:
        """A finite number, higher is better.

        completion: the decoded tokens, without specials. finished: False when the completion was
        cut before it ended by itself. Raises RewardError when it cannot be told; anything else
        that it raises counts as that, too. Called by several threads at a time where
        rl.reward_workers is more than 1.
        """
        ...


def exact_match(completion: str, problem: Problem, finished: bool) -> float:
    """1 for the answer and nothing else (white space around it aside), ended by itself; else 0."""
    return float(finished and completion.strip() == problem.answer)


def build_reward(config: TrainConfig) -> Reward:
    """What rl.reward names. Raises ValueError when it cannot be imported or built."""
    found = resolve(config.rl.reward, REWARDS, "rl.reward")
    return found(config) if isinstance(found, type) else found


def score_samples(
    reward: Reward,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    problems: Sequence[Problem],
    workers: int = 1,
) -> list[float | RewardError]:
    """The reward of each sample, or why it has none; `workers` are judged at a time."""

    def score(sample: Sample, problem: Problem) -> float | RewardError:
        name, completion = sample.request_id, tokenizer.decode(sample.token_ids)
        try:
            found = float(reward(completion, problem, sample.finished))
        except RewardError as error:
            return error
        except Exception as error:  # of a program that reads whatever a model may say
            why = RewardError(f"rl.reward failed at {name}: {type(error).__name__}: {error}")
            why.__cause__ = error
            return why
        if not math.isfinite(found):
            return RewardError(f"rl.reward gave {found} for {name}; expected a finite number")
        return found

    if workers == 1:
        return [score(*pair) for pair in zip(samples, problems, strict=True)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(score, samples, problems))
