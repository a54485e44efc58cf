"""What a training run can be told. No torch here: `gossamer validate` reads this file alone.

The one idea: whatever cannot be right is refused when the config is built, in one sentence that
names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gossamer.comm.config import LogConfig
from gossamer.comm.outer.config import OuterConfig
from gossamer.parallel.config import ParallelConfig
from gossamer.trainer.data.config import DataConfig, TaskConfig, TokenizerConfig
from gossamer.trainer.import_path import check_name
from gossamer.trainer.moe.config import FAMILY_ROUTERS, ROUTERS, MoEConfig
from gossamer.trainer.rl.config import RLConfig
from gossamer.trainer.sparsity.config import SparsityConfig
from gossamer.trainer.sparsity.schedules import window
from gossamer.trainer.step.config import HeldoutConfig, MetricsConfig, OptimConfig, PhaseConfig


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


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
        family = self.hf.get("model_type")
        _require(
            self.path is not None or family in FAMILY_ROUTERS,
            f"model.hf.model_type is {family}; expected one whose MoE blocks gossamer knows:"
            f" {', '.join(FAMILY_ROUTERS)}",
        )
        _require(
            self.balance_loss_coef >= 0.0,
            f"model.balance_loss_coef is {self.balance_loss_coef}; expected 0 or more",
        )
        if self.router is not None:
            check_name(self.router, ROUTERS, "model.router")
        _require(
            self.recompute in RECOMPUTE,
            f"model.recompute is {self.recompute}; expected one of {RECOMPUTE}",
        )


CHECKPOINT_SCHEMES = ("file", "s3", "gs", "az")
"""Stores that are written to and outlive a cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the whole training state is written, and how many are kept."""

    every_steps: int = 50
    """Optimizer steps between checkpoints; one is always written at the end of a phase."""
    keep_last: int = 2
    """Older checkpoints are removed once this many newer ones are whole."""
    asynchronous: bool = True
    """True writes beside the next steps, from a copy in host memory; False writes before them."""
    url: str | None = None
    """A folder, or s3://, gs:// or az:// of this run's own; None is RUN_DIR/checkpoints."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            value = getattr(self, name)
            _require(value >= 1, f"checkpoint.{name} is {value}; expected at least 1")
        scheme, mark, _ = (self.url or "").partition("://")
        _require(
            self.url != "" and (not mark or scheme in CHECKPOINT_SCHEMES),
            f"checkpoint.url is {self.url!r}; expected a folder or one of"
            f" {', '.join(f'{scheme}://' for scheme in CHECKPOINT_SCHEMES)}",
        )


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
    outer: OuterConfig | None = None
    """The rounds that replicas of the run meet in; None = this one is alone (docs/replicas.md)."""
    sparsity: SparsityConfig | None = None
    """Which weights are zero, and when that changes; None = all live."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the state is written."""
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    """Evaluation on text that is never trained on."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is measured, and where numbers go."""
    deterministic: bool = False
    """Refuses operations that may not repeat bit for bit, and runs each rank on one thread; slower
    (docs/runs.md)."""

    @property
    def max_steps(self) -> int:
        """Updates of all phases, if none ends early."""
        return sum(phase.max_steps for phase in self.phases)

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
        _require(
            all(phase.kind != "sft" for phase in self.phases)
            or self.data.task_share == 1.0
            or any(source.messages_field is not None for source in self.data.sources),
            "an sft phase needs conversations; expected data.sources with a messages_field, or"
            " data.task_share 1",
        )
        copies = self.model.router == "dense_to_sparse" and self.model.moe.dense_to_sparse
        _require(
            self.sparsity is None or not (copies and copies.diversify_steps),
            "model.moe.dense_to_sparse.diversify_steps with sparsity; expected 0, for experts that"
            " are copied have other masks",
        )
        if self.sparsity is not None:
            for rule in self.sparsity.rules:
                window(rule.schedule, self.sparsity.total_steps or self.max_steps)
        if self.outer is not None:
            self._check_outer(self.outer)
            if self.sparsity is not None:
                self._check_shared_masks(self.outer, self.sparsity)
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            experts = self.model.hf.get(name)
            _require(
                not isinstance(experts, int) or experts % self.parallel.expert == 0,
                f"parallel.expert={self.parallel.expert} does not divide"
                f" {name}={experts} of model.hf",
            )

    def _check_shared_masks(self, outer: OuterConfig, sparsity: SparsityConfig) -> None:
        """Masks change where rounds end, by what all replicas know."""
        non_finite, rounds = self.optim.non_finite, f"outer.inner_steps={outer.inner_steps}"
        _require(outer.rule != "dgc", "outer.rule is dgc with sparsity; expected another rule")
        _require(non_finite == "raise", f"optim.non_finite is {non_finite}; expected raise")
        total = sparsity.total_steps or self.max_steps
        for number, rule in enumerate(sparsity.rules):
            where, every = f"sparsity.rules[{number}]", rule.schedule.every_steps
            end = round(rule.end.at * total)
            _require(
                rule.flow.kind != "masked"
                or (
                    every % outer.inner_steps == 0
                    and (end % outer.inner_steps == 0 or end == total)
                ),
                f"{where}: schedule.every_steps is {every} and end.at step {end}; expected"
                f" multiples of {rounds}",
            )
            _require(
                rule.flow.kind == "masked" or outer.inner_steps % every == 0,
                f"{where}.schedule.every_steps is {every}; expected a divisor of {rounds}, for"
                " masks follow the weights that a round makes",
            )
            _require(
                rule.end.kind != "prune",
                f"{where}.end.kind is prune with outer; expected freeze, for these masks are each"
                " replica's own",
            )
            _require(
                rule.schedule.unit != "tokens",
                f"{where}.schedule.unit is tokens with outer; expected steps or compute",
            )
            used = {rule.criterion, rule.regrow.criterion}
            _require(
                rule.flow.kind != "masked" or "momentum" not in used,
                f"{where} uses the momentum with outer; expected another criterion, for replicas"
                " have their own",
            )

    def _check_outer(self, outer: OuterConfig) -> None:
        """All replicas end a phase at the same step, and rows stay where they are."""
        for phase in self.phases:
            _require(
                phase.until_exact_match is None,
                f"phases[{phase.name}].until_exact_match is {phase.until_exact_match} with outer;"
                " expected null: replicas would end the phase at different steps",
            )
        moves = self.parallel.placement.every_steps
        _require(moves == 0, f"parallel.placement.every_steps is {moves} with outer; expected 0")
        if outer.rule != "dgc":
            return
        for name, found, expected in (
            ("parallel.zero_stage", self.parallel.zero_stage, 0),
            ("optim.beta1", self.optim.beta1, 0.0),
            ("optim.non_finite", self.optim.non_finite, "raise"),
        ):
            _require(
                found == expected, f"{name} is {found} with outer.rule dgc; expected {expected}"
            )
