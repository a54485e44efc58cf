"""What a training run can be told. No torch here: `gossamer validate` reads this file alone.

The one idea: whatever cannot be right is refused when the config is built, in one sentence that
names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gossamer.comm.config import LogConfig
from gossamer.parallel.config import ParallelConfig
from gossamer.trainer.moe.config import MoEConfig
from gossamer.trainer.rl.config import RLConfig
from gossamer.trainer.step.config import HeldoutConfig, MetricsConfig, OptimConfig, PhaseConfig


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


RECOMPUTE = ("none", "moe", "block")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Hugging Face MoE model: its folder, or its config to build it at random from."""

    path: str | None = None
    """HF folder that `gossamer export` wrote, or any with config.json, safetensors and a
    tokenizer.json of gossamer's; None builds `hf` with random weights."""
    hf: Mapping[str, int | float | str | bool | None] = field(default_factory=dict)
    """HF config fields, `model_type` among them; vocabulary and token ids come from the run's
    tokenizer."""
    router: str | None = None
    """A name in trainer/moe/router.py, or an import path `package.module:name`; None = as the
    family routes."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """What routers, their losses and their trace can be told."""
    balance_loss_coef: float = 0.001
    """Weight of the load-balance loss; 0 switches it off."""
    attn_implementation: str = "sdpa"
    """transformers' attention implementation: sdpa or eager."""
    recompute: str = "none"
    """What the backward pass computes again instead of keeping its activations: none, moe (routing,
    dispatch and experts) or block (whole decoder layers). Changes no bit."""

    def __post_init__(self) -> None:
        _require(
            (self.path is None) == bool(self.hf),
            "model.path and model.hf: expected exactly one of them",
        )
        _require(
            self.path is not None or "model_type" in self.hf,
            "model.hf.model_type is missing; expected a Hugging Face model type such as qwen3_moe",
        )
        _require(
            self.balance_loss_coef >= 0.0,
            f"model.balance_loss_coef is {self.balance_loss_coef}; expected 0 or more",
        )
        _require(
            self.recompute in RECOMPUTE,
            f"model.recompute is {self.recompute}; expected one of {RECOMPUTE}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the whole training state is written, and how many are kept."""

    every_steps: int = 50
    """Optimizer steps between checkpoints; one is always written at the end of a phase."""
    keep_last: int = 2
    """Older checkpoints are removed once this many newer ones are whole."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            value = getattr(self, name)
            _require(value >= 1, f"checkpoint.{name} is {value}; expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All that one replica needs to know to train."""

    phases: tuple[PhaseConfig, ...]
    """Run in order."""
    model: ModelConfig
    """The model."""
    seed: int = 1
    """Of weights, data order, prompts and sampling."""
    micro_rows: int = 64
    """Rows of one forward and backward pass on one rank; more rows accumulate gradients."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Trained on the run's own text."""
    task: TaskConfig | None = None
    """The verifiable task; None = corpus text only."""
    data: DataConfig = field(default_factory=DataConfig)
    """Next-token batches."""
    rl: RLConfig = field(default_factory=RLConfig)
    """Used by grpo phases."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the replica's ranks share the work."""
    log: LogConfig = field(default_factory=LogConfig)
    """The weight log that grpo phases publish to."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the state is written."""
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    """Evaluation on text that is never trained on."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is measured, and where numbers go."""
    deterministic: bool = False
    """Refuses operations that may not repeat bit for bit, and runs each rank on one thread; slower
    (docs/runs.md)."""

    def __post_init__(self) -> None:
        _require(bool(self.phases), "phases is empty; expected at least one phase")
        _require(self.micro_rows >= 1, f"micro_rows is {self.micro_rows}; expected at least 1")
        _require(self.seed >= 0, f"seed is {self.seed}; expected 0 or more")
        needs_task = [p.name for p in self.phases if p.kind == "grpo" or p.until_exact_match]
        _require(
            self.task is not None or not needs_task,
            f"phases {needs_task} need a task; expected a `task:` section",
        )
        _require(
            self.task is not None or self.data.task_share == 0.0,
            f"data.task_share is {self.data.task_share} without a task; expected 0",
        )
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            experts = self.model.hf.get(name)
            _require(
                not isinstance(experts, int) or experts % self.parallel.expert == 0,
                f"parallel.expert={self.parallel.expert} does not divide"
                f" {name}={experts} of model.hf",
            )
