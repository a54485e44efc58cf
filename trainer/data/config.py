"""What data, tokenizer and task can be told. No torch here.

The one idea: a mixture is a list of sources, each with its share; what is left unsaid is read off
the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The byte-level BPE that the run trains for itself."""

    vocab_size: int = 512
    """Tokens in all: 3 specials, 256 bytes, the rest merges."""
    train_chars: int = 1_000_000
    """Characters of text the merges are learned from."""

    def __post_init__(self) -> None:
        _require(
            self.vocab_size >= 259,
            f"tokenizer.vocab_size is {self.vocab_size}; expected at least 259 (specials + bytes)",
        )
        _require(
            self.train_chars > 0,
            f"tokenizer.train_chars is {self.train_chars}; expected a positive number",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The verifiable task, one of reasoning-gym's."""

    dataset: str = "chain_sum"
    """Name of a reasoning-gym dataset."""
    parameters: Mapping[str, int | float | str | bool] = field(
        default_factory=lambda: {
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 2,
            "max_digits": 2,
        }
    )
    """The dataset's own parameters, without its seed and size."""
    size: int = 20_000
    """Entries generated before those with the same question are dropped."""
    seed: int = 0
    """Seed of the generator."""
    heldout_permille: int = 60
    """Thousandths of the questions that are never trained on, for the final number."""
    dev_permille: int = 30
    """Thousandths of the questions that are never trained on, for looking at during a run."""
    min_heldout: int = 500
    """Fewest held-out problems; a task with fewer is refused."""

    def __post_init__(self) -> None:
        _require(bool(self.dataset), "task.dataset is empty; expected a reasoning-gym dataset name")
        own = {"seed", "size"} & set(self.parameters)
        _require(
            not own,
            f"task.parameters holds {sorted(own)}; set task.seed and task.size instead",
        )
        _require(self.size > 0, f"task.size is {self.size}; expected a positive number")
        _require(self.seed >= 0, f"task.seed is {self.seed}; expected 0 or more")
        for name in ("heldout_permille", "dev_permille", "min_heldout"):
            value = getattr(self, name)
            _require(value >= 0, f"task.{name} is {value}; expected 0 or more")
        _require(
            self.heldout_permille + self.dev_permille < 1000,
            "task.heldout_permille + task.dev_permille is "
            f"{self.heldout_permille + self.dev_permille}; expected less than 1000",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Next-token batches: rows of whole documents, from task text and a text corpus."""

    seq_len: int = 128
    """Tokens in a row; longer documents are cut into windows of this length."""
    num_rows: int = 64
    """Rows in the batch of one step, over all ranks."""
    task_share: float = 0.8
    """Share of the rows that hold task text (0 to 1); the others hold corpus text."""
    answer_only: bool = False
    """True puts no loss on the question's tokens of task text."""
    corpus_path: str | None = None
    """A text file, or a folder of *.py, *.md and *.txt; None is the standard library's source."""
    corpus_chars: int = 1_000_000
    """Characters of the corpus that are read."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "num_rows"):
            value = getattr(self, name)
            least = 2 if name == "seq_len" else 1
            _require(value >= least, f"data.{name} is {value}; expected at least {least}")
        _require(
            0.0 <= self.task_share <= 1.0,
            f"data.task_share is {self.task_share}; expected a number from 0 to 1",
        )
        _require(
            self.corpus_chars > 0,
            f"data.corpus_chars is {self.corpus_chars}; expected a positive number",
        )
