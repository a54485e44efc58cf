"""Rewards: how good a completion is, judged by a program.

The one idea: a reward sees text, not tokens, so it knows no tokenizer and no engine. An outsider's
is named by import path (`rl.reward: my_package.rewards:digits_right`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from gossamer.comm.rollout import Sample
from gossamer.trainer.tokenizer import Tokenizer


class Reward(Protocol):
    """A pure function of what was asked for and what came."""

    def __call__(self, completion: str, answer: str, finished: bool) -> float:
        """A finite number, higher is better.

        completion: the decoded tokens, without specials. finished: False when the completion was
        cut before it ended by itself.
        """
        ...


def exact_match(completion: str, answer: str, finished: bool) -> float:
    """1 for the answer and nothing else (white space around it aside), ended by itself; else 0."""
    return float(finished and completion.strip() == answer)


def score_samples(
    reward: Reward, tokenizer: Tokenizer, samples: Sequence[Sample], answers: Sequence[str]
) -> list[float]:
    """The reward of each sample. Raises ValueError when a reward is not a finite number."""
    scores = []
    for sample, answer in zip(samples, answers, strict=True):
        score = reward(tokenizer.decode(sample.token_ids), answer, sample.finished)
        if not math.isfinite(score):
            raise ValueError(f"rl.reward gave {score} for {sample.request_id}; expected a number")
        scores.append(float(score))
    return scores
