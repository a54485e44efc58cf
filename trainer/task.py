"""The verifiable task: questions from reasoning-gym whose answers can be checked by a program.

The one idea: which split a question is in depends on its text alone, so no seed, size or order can
move a held-out question into training.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from gossamer.trainer.data.config import TaskConfig
from gossamer.trainer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question and its answer, as the model reads and writes them."""

    problem_id: int
    """Number of the question in the order of generation; one question has one id."""
    question: str
    answer: str

    @property
    def text(self) -> str:
        """Question and answer in one line, as a tokenizer may learn from it."""
        return f"{self.question} {self.answer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskProblems:
    """Three disjoint sets of problems; only `train` is ever trained on."""

    train: list[Problem]
    dev: list[Problem]
    heldout: list[Problem]


def prompt_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """<bos> and the question: the tokens that an engine is given."""
    return [*tokenizer.start_ids, *tokenizer.encode(problem.question)]


def answer_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """A space, the answer and <eos>: the completion that is right.

    Encoded apart from the question, so that training text splits where a prompt ends.
    """
    return [*tokenizer.encode(f" {problem.answer}"), tokenizer.eos_id]


def build_problems(config: TaskConfig) -> TaskProblems:
    """Generates the problems and splits them by question.

    Raises ValueError for a data set or parameter that reasoning-gym does not know, and for a task
    with too few held-out or no training questions.
    """
    questions: dict[str, str] = {}
    for entry in gym_dataset(config):
        questions.setdefault(entry["question"], str(entry["answer"]))
    splits = TaskProblems(train=[], dev=[], heldout=[])
    for problem_id, (question, answer) in enumerate(questions.items()):
        problem = Problem(problem_id=problem_id, question=question, answer=answer)
        getattr(splits, split_of(question, config)).append(problem)
    if len(splits.heldout) < config.min_heldout or not splits.train:
        raise ValueError(
            f"task: {len(questions)} unique questions give {len(splits.heldout)} held-out and "
            f"{len(splits.train)} training problems; expected at least {config.min_heldout} "
            "held-out and 1 training (a larger task.size or harder task.parameters)"
        )
    return splits


def split_of(question: str, config: TaskConfig) -> str:
    """The split a question is in: "heldout", "dev" or "train"."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest(), "big") % 1000
    if place < config.heldout_permille:
        return "heldout"
    if place < config.heldout_permille + config.dev_permille:
        return "dev"
    return "train"


def gym_dataset(config: TaskConfig) -> Any:  # noqa: ANN401
    """reasoning-gym's data set of the task. Raises ValueError for one that it cannot build."""
    import reasoning_gym  # takes a second to import

    try:
        return reasoning_gym.create_dataset(
            config.dataset, seed=config.seed, size=config.size, **config.parameters
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"task: reasoning-gym cannot build {config.dataset!r} with {dict(config.parameters)}: "
            f"{error}"
        ) from error
