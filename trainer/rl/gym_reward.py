"""reasoning-gym's own scorer as a reward: partial credit where a data set gives it.

The one idea: a data set may accept other answers than the one it names, and needs the whole entry
to tell; entries are generated again from the task's config, so problems.json need not hold them.
Scorers are written for answers, not for whatever a model says: one that raises has found no answer.
"""

from __future__ import annotations

from typing import Any

from gossamer.trainer.config import TrainConfig
from gossamer.trainer.rl.reward import RewardError
from gossamer.trainer.task import Problem, gym_dataset


class GymReward:
    """Reward; 0 for a completion that was cut, or that the scorer cannot read.

    Raises ValueError without a task.
    """

    def __init__(self, config: TrainConfig) -> None:
        if config.task is None:
            raise ValueError("rl.reward reasoning_gym needs a task; expected a `task:` section")
        self._dataset = gym_dataset(config.task)
        self._entries: dict[str, dict[str, Any]] = {}
        for entry in self._dataset:
            self._entries.setdefault(entry["question"], entry)

    def __call__(self, completion: str, problem: Problem, finished: bool) -> float:
        """The data set's score of the completion, white space around it aside; usually 0 to 1."""
        if not finished:
            return 0.0
        if problem.question not in self._entries:
            raise RewardError(
                f"problem {problem.problem_id} is not one of task.dataset's; expected the task that"
                " problems.json was made of"
            )
        entry = self._entries[problem.question]
        try:
            return float(self._dataset.score_answer(completion.strip(), entry))
        except Exception:  # it parses what the model said, and names no errors of its own
            return 0.0
