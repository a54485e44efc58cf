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
    """A foreign tokenizer, or the byte-level BPE that the run trains for itself."""

    path: str | None = None
    """HF folder whose tokenizer.json is taken; None is model.path's, and without one the run's own
    BPE is trained."""
    chat_template: str | None = None
    """A file with a Jinja chat template, instead of the tokenizer's own."""
    vocab_size: int = 512
    """Of the run's own BPE: tokens in all: 3 specials, 256 bytes, the rest merges."""
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
class SourceConfig:
    """Files of one format: texts for next_token phases, or conversations for sft phases."""

    kind: str
    """parquet, jsonl, text (a file is a document) or hf (a datasets folder), or an import path."""
    path: str
    """A file, a folder that is searched for files of the kind, or a pattern with * or **; for hf
    what `Dataset.save_to_disk` wrote, or else anything `datasets.load_dataset` takes."""
    share: float = 1.0
    """Weight beside the other sources of the same phase; any positive number."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    messages_field: str | None = None
    """Field or column that holds a conversation, [{"role": ..., "content": ...}, ...]. When it is
    set, the source is read by sft phases and the loss counts on what the assistant says."""
    split: str = "train"
    """Of kind hf, which split."""

    def __post_init__(self) -> None:
        _require(bool(self.kind), "kind is empty; expected parquet, jsonl, text or hf")
        _require(bool(self.path), "path is empty; expected a file, a folder or a pattern")
        _require(self.share > 0.0, f"share is {self.share}; expected a positive number")
        _require(
            self.kind != "text" or self.messages_field is None,
            f"messages_field is {self.messages_field!r} with kind text; expected jsonl, parquet or"
            " hf, whose records have fields",
        )

    @property
    def field(self) -> str:
        """The field that is learned from."""
        return self.messages_field or self.text_field


LONG_CONVERSATIONS = ("cut", "drop")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Rows of whole documents: of task text, and of a mixture of files or a corpus."""

    seq_len: int = 128
    """Tokens in a row; longer documents are cut into windows of this length."""
    num_rows: int = 64
    """Rows in the batch of one step, over all ranks."""
    task_share: float = 0.8
    """Share of the rows that hold task problems (0 to 1), in sft phases as conversations; the
    others hold texts or conversations of the sources, or text of the corpus."""
    answer_only: bool = False
    """True puts no loss on the question's tokens of task text."""
    corpus_path: str | None = None
    """A text file, or a folder of *.py, *.md and *.txt; None is the standard library's source."""
    corpus_chars: int = 1_000_000
    """Characters of the corpus that are read."""
    sources: tuple[SourceConfig, ...] = ()
    """Files to learn from, instead of the corpus."""
    long_conversations: str = "cut"
    """What is done with a conversation longer than seq_len: cut keeps its beginning, drop leaves it
    out."""
    buffer_tokens: int = 4_194_304
    """Tokens of a source that are held, shuffled and packed together; twice as many with those
    that are read ahead."""
    replica_index: int = 0
    """Which replica this is, from 0: each reads documents of its own."""
    num_replicas: int = 1
    """Replicas that share the sources."""

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
        _require(
            not self.sources or self.corpus_path is None,
            "data.corpus_path and data.sources: expected at most one of them",
        )
        _require(
            self.long_conversations in LONG_CONVERSATIONS,
            f"data.long_conversations is {self.long_conversations}; expected one of"
            f" {LONG_CONVERSATIONS}",
        )
        _require(
            self.buffer_tokens > 0,
            f"data.buffer_tokens is {self.buffer_tokens}; expected a positive number",
        )
        _require(
            0 <= self.replica_index < self.num_replicas,
            f"data.replica_index is {self.replica_index} of {self.num_replicas} replicas; expected"
            " 0 to num_replicas - 1",
        )
