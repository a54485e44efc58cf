"""Which problems a step asks, and the requests that ask them.

The one idea: both are pure functions of (seed, step), so a resumed run asks what the killed one
would have asked, whichever engines there are; each grpo phase has a seed of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from gossamer.comm.rollout import Request
from gossamer.trainer.batch import permutation
from gossamer.trainer.rl.config import RLConfig


def phase_seed(seed: int, phase: int) -> int:
    """The seed of prompts and samples of the run's grpo phase number `phase`; the run's, of 0."""
    if phase == 0:
        return seed
    words = f"{seed},grpo phase,{phase}".encode()
    return int.from_bytes(blake2b(words, digest_size=6).digest(), "little")


def prompt_batch(seed: int, step: int, num_prompts: int, num_problems: int) -> list[int]:
    """num_prompts different numbers below num_problems.

    An epoch is num_problems // num_prompts steps and asks no problem twice; the few that are left
    over wait for another epoch's order. Raises ValueError when there are too few problems.
    """
    steps_per_epoch = num_problems // num_prompts
    if steps_per_epoch == 0:
        raise ValueError(
            f"rl.prompts_per_step is {num_prompts}, but the task has {num_problems} training "
            "problems; expected no more prompts than problems"
        )
    epoch, place = divmod(step, steps_per_epoch)
    order = permutation(num_problems, "prompts", seed, epoch)
    return order[place * num_prompts : (place + 1) * num_prompts].tolist()


def other_prompts(
    seed: int, step: int, num_prompts: int, num_problems: int, asked: Collection[int]
) -> list[int]:
    """Up to num_prompts different numbers below num_problems that are not in `asked`."""
    order = permutation(num_problems, "other prompts", seed, step)
    return order[~np.isin(order, list(asked))][:num_prompts].tolist()


def request_id(step: int, problem_id: int, sample: int) -> str:
    """Names one completion in a phase, in the books and in errors."""
    return f"{step}/{problem_id}/{sample}"


def requests_for(
    step: int, seed: int, prompts: Mapping[int, Sequence[int]], config: RLConfig
) -> list[list[Request]]:
    """The step's rollout units: fixed lists of requests, whole groups of samples side by side.

    prompts: token ids by problem id, in the order asked. Which unit holds a request depends on the
    config alone, never on the engines there are.
    """
    groups = [
        [
            Request(
                request_id=request_id(step, problem_id, sample),
                prompt_ids=tuple(prompt_ids),
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                key=(seed, step, problem_id, sample),
            )
            for sample in range(config.samples_per_prompt)
        ]
        for problem_id, prompt_ids in prompts.items()
    ]
    units = range(0, len(groups), config.prompts_per_unit)
    return [sum(groups[start : start + config.prompts_per_unit], []) for start in units]
