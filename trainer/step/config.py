"""What the optimizer, its phases and their measurement can be told. No torch here.

The one idea: a learning rate is a pure function of the phase and the step, so each shape is a few
fields and nothing of it is saved.
"""

from __future__ import annotations

from dataclasses import dataclass


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


NON_FINITE = ("raise", "skip")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW on float32 masters; the learning rate is a phase's."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices; vectors are never decayed."""
    max_norm: float = 1.0
    """The global gradient norm is clipped to this; 0 = no clipping."""
    non_finite: str = "raise"
    """What a gradient norm that is not finite does: raise ends the run; skip drops the batch, and
    weights, moments, routing biases and the learning rate stay where they are."""
    max_skips: int = 10
    """Skips in a row; one more ends the run."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"optim.{name} is {value}; expected 0 to below 1")
        _require(self.eps > 0.0, f"optim.eps is {self.eps}; expected a positive number")
        for name in ("weight_decay", "max_norm"):
            value = getattr(self, name)
            _require(value >= 0.0, f"optim.{name} is {value}; expected 0 or more")
        _require(
            self.non_finite in NON_FINITE,
            f"optim.non_finite is {self.non_finite}; expected one of {NON_FINITE}",
        )
        _require(self.max_skips >= 1, f"optim.max_skips is {self.max_skips}; expected at least 1")


PHASE_KINDS = ("next_token", "sft", "grpo")
SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseConfig:
    """A stretch of steps with one loss and one learning-rate curve."""

    name: str
    """Shown in metrics: pretrain, warm_start, rl."""
    kind: str
    """next_token, sft (next token of what the assistant says in conversations) or grpo."""
    max_steps: int
    """Optimizer steps of this phase at most."""
    lr: float
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: str = "cosine"
    """After warm-up: cosine or linear, from lr down to final_lr_share of it at max_steps; constant;
    or wsd, constant and then linear over the last decay_steps."""
    final_lr_share: float = 1.0
    """The rate at max_steps as a share of lr; 1 = constant."""
    decay_steps: int | None = None
    """Of schedule wsd: how many of the last steps the rate falls over."""
    until_exact_match: float | None = None
    """Ends the phase early once greedy exact match on the dev problems reaches this."""
    eval_every_steps: int = 25
    """How often the dev problems are looked at (next_token phases with until_exact_match)."""

    def __post_init__(self) -> None:
        where = f"phases[{self.name}]"
        _require(self.kind in PHASE_KINDS, f"{where}.kind is {self.kind}; expected {PHASE_KINDS}")
        for name in ("max_steps", "eval_every_steps", "lr"):
            value = getattr(self, name)
            _require(value > 0, f"{where}.{name} is {value}; expected a positive number")
        _require(
            0 <= self.warmup_steps <= self.max_steps,
            f"{where}.warmup_steps is {self.warmup_steps}; expected 0 to max_steps",
        )
        for name in ("final_lr_share", "until_exact_match"):
            value = getattr(self, name)
            _require(
                value is None or 0.0 <= value <= 1.0,
                f"{where}.{name} is {value}; expected a number from 0 to 1",
            )
        self._check_schedule(where)

    def _check_schedule(self, where: str) -> None:
        kind, share, decay = self.schedule, self.final_lr_share, self.decay_steps
        _require(kind in SCHEDULES, f"{where}.schedule is {kind}; expected one of {SCHEDULES}")
        _require(
            kind == "cosine" or (share == 1.0) == (kind == "constant"),
            f"{where}.final_lr_share is {share} with schedule {kind};"
            f" expected {'1' if kind == 'constant' else 'less than 1'}",
        )
        most = self.max_steps - self.warmup_steps
        _require(
            decay is None if kind != "wsd" else decay is not None and 1 <= decay <= most,
            f"{where}.decay_steps is {decay} with schedule {kind};"
            f" expected {f'1 to {most}' if kind == 'wsd' else 'null'}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutConfig:
    """Loss on text of documents that are never trained on."""

    every_steps: int = 0
    """Optimizer steps between evaluations; 0 = none, and nothing is held out."""
    num_rows: int = 64
    """Rows of held-out documents, the same ones every time."""
    permille: int = 20
    """Thousandths of the documents that are held out, by a hash of their text."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, f"heldout.every_steps is {self.every_steps}; expected >= 0")
        _require(self.num_rows >= 1, f"heldout.num_rows is {self.num_rows}; expected at least 1")
        _require(
            1 <= self.permille <= 999, f"heldout.permille is {self.permille}; expected 1 to 999"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """What is measured, and where numbers go besides RUN_DIR/metrics.jsonl."""

    wandb_mode: str = "offline"
    """offline, online or disabled."""
    wandb_project: str = "gossamer"
    """Project name in wandb."""
    expert_load_every_steps: int = 10
    """Steps between records of tokens per expert."""
    changes_every_steps: int = 0
    """Steps between counts of which published elements changed, by layer and expert (docs/rl.md);
    each rank keeps two copies of its share in the publish dtype. 0 = none."""
    peak_flops: float | None = None
    """FLOP/s that one rank could do, for `mfu`; None = those of a matrix product, measured at the
    start."""
    profile_steps: tuple[int, int] | None = None
    """First and last optimizer step (from 1) that torch's profiler watches; each rank writes
    RUN_DIR/profile/rank{rank}.json, a Chrome trace."""

    def __post_init__(self) -> None:
        modes = ("offline", "online", "disabled")
        _require(
            self.wandb_mode in modes,
            f"metrics.wandb_mode is {self.wandb_mode}; expected one of {modes}",
        )
        _require(
            self.expert_load_every_steps >= 1,
            f"metrics.expert_load_every_steps is {self.expert_load_every_steps}; expected >= 1",
        )
        _require(
            self.changes_every_steps >= 0,
            f"metrics.changes_every_steps is {self.changes_every_steps}; expected 0 or more",
        )
        _require(
            self.peak_flops is None or self.peak_flops > 0,
            f"metrics.peak_flops is {self.peak_flops}; expected a positive number or null",
        )
        steps = self.profile_steps
        _require(
            steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            f"metrics.profile_steps is {steps}; expected [first, last], counted from 1",
        )
