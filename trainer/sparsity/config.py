"""What a sparse pre-training plan can be told. No torch here.

The one idea: a plan is a list of rules, and a rule is one choice on each of a few axes that know
nothing of each other; a method of the literature is a set of choices (recipes.py), not a class.

Densities are shares of weights that are kept; times are shares (0 to 1) of the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gossamer.trainer.import_path import check_name
from gossamer.trainer.sparsity.conflicts import check_together

SPARSITY_METHODS = {"plan": "gossamer.trainer.sparsity.plan:SparsityPlan"}
"""Each is built as `build(config)`, config being a SparsityConfig."""

CRITERIA = {
    "magnitude": "gossamer.trainer.sparsity.criteria:magnitude",
    "random": "gossamer.trainer.sparsity.criteria:random",
    "gradient": "gossamer.trainer.sparsity.criteria:gradient",
    "saliency": "gossamer.trainer.sparsity.criteria:saliency",
    "momentum": "gossamer.trainer.sparsity.criteria:momentum",
}
"""Scores of weights, to keep them by or to grow them by: `score(band, draw)`, see criteria.py."""

GROWN_BY = {"none": "", "random": CRITERIA["random"], "gradient": CRITERIA["gradient"]}

GRADIENT_CRITERIA = ("gradient", "saliency")
"""Those that need dense gradients."""

DISTRIBUTIONS = ("uniform", "erk", "layer", "global")
SCHEDULES = ("static", "one_shot", "levels", "linear", "polynomial", "geometric", "cyclic")
FALLING = ("linear", "polynomial", "geometric")
UNITS = ("steps", "tokens", "compute")
PATTERNS = ("unstructured", "n_m", "n_m_floor", "block")
PATTERN_DECAYS = ("none", "stepwise", "geometric")
FLOWS = ("masked", "ste", "soft", "dense")
DECAY_PLACES = ("gradient", "decoupled", "ast", "adams")
SOFTENINGS = ("linear", "exponential")
ENDS = ("freeze", "densify", "prune")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _one_of(where: str, value: str, names: tuple[str, ...]) -> None:
    _require(value in names, f"{where} is {value!r}; expected one of {names}")


def _share(where: str, value: float) -> None:
    _require(0.0 <= value <= 1.0, f"{where} is {value}; expected a number from 0 to 1")


def _at_least(where: str, value: float, least: int) -> None:
    _require(value >= least, f"{where} is {value}; expected at least {least}")


def _density(where: str, value: float) -> None:
    _require(0.0 < value <= 1.0, f"{where} is {value}; expected above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionConfig:
    """How the plan's density is dealt out to matrices; each expert's matrix stands by itself."""

    kind: str = "uniform"
    """uniform: the same density everywhere; erk: in proportion to (rows + columns) / (rows x
    columns); layer or global: the best weights of a layer's or of all matched matrices."""
    power: float = 1.0
    """erk: exponent of the proportion; 0 is uniform."""
    floor: float = 0.0
    """No matrix is sparser than this density, however cold its expert."""
    ceiling: float = 1.0
    """No matrix is denser than this density."""

    def __post_init__(self) -> None:
        _one_of("distribution.kind", self.kind, DISTRIBUTIONS)
        _at_least("distribution.power", self.power, 0)
        _share("distribution.floor", self.floor)
        _require(
            self.floor <= self.ceiling <= 1.0 and self.ceiling > 0.0,
            f"distribution.ceiling is {self.ceiling}; expected floor={self.floor} to 1, above 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Density over time, and how often masks change."""

    kind: str = "static"
    """static; one_shot: dense until start; levels: `levels` in equal frames from start to stop;
    linear, polynomial, geometric: from initial_density at start to density at stop; cyclic (AC/DC):
    sparse and dense in turn from start to stop, dense before and sparse after."""
    density: float = 1.0
    """Share of the weights that is kept at the end. A pattern n_m says this itself."""
    initial_density: float = 1.0
    """Before `start`, of linear, polynomial and geometric."""
    unit: str = "steps"
    """What start and stop are shares of: steps, tokens, or compute (the sum of densities)."""
    start: float = 0.0
    """Share of the run at which the density begins to fall."""
    stop: float = 1.0
    """Share of the run from which on the density is the last one."""
    every_steps: int = 100
    """Optimizer steps between mask changes."""
    power: float = 3.0
    """polynomial: 3 is the cubic schedule of gradual magnitude pruning."""
    levels: tuple[float, ...] = ()
    """levels: densities, one a frame; the last is `density`."""
    period_steps: int = 0
    """cyclic: length of one sparse or dense stretch."""

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, SCHEDULES)
        _one_of("schedule.unit", self.unit, UNITS)
        _density("schedule.density", self.density)
        _density("schedule.initial_density", self.initial_density)
        _share("schedule.start", self.start)
        _require(
            self.start <= self.stop <= 1.0,
            f"schedule.stop is {self.stop}; expected start={self.start} to 1",
        )
        _at_least("schedule.every_steps", self.every_steps, 1)
        _require(self.power > 0, f"schedule.power is {self.power}; expected above 0")
        for level in self.levels:
            _density("schedule.levels", level)
        self._check_kind()

    def _check_kind(self) -> None:
        falls = self.kind in FALLING
        _require(
            self.initial_density >= self.density if falls else self.initial_density == 1.0,
            f"schedule.initial_density is {self.initial_density} with kind {self.kind};"
            f" expected {'at least density' if falls else '1'}",
        )
        _require(
            self.unit != "compute" or falls,
            f"schedule.unit is compute with kind {self.kind}; expected linear, polynomial or"
            " geometric, whose compute has a closed form",
        )
        _require(
            bool(self.levels) == (self.kind == "levels")
            and (not self.levels or self.levels[-1] == self.density),
            f"schedule.levels is {self.levels} with kind {self.kind}; expected densities that end"
            " in schedule.density for levels, none for the others",
        )
        _require(
            (self.period_steps >= 1) == (self.kind == "cyclic"),
            f"schedule.period_steps is {self.period_steps} with kind {self.kind};"
            " expected at least 1 for cyclic, 0 for the others",
        )
        _require(
            self.period_steps % self.every_steps == 0,
            f"schedule.period_steps is {self.period_steps}; expected a multiple of"
            f" every_steps={self.every_steps}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialConfig:
    """The first mask, drawn before the first step where there is one from the start: flow masked
    and schedule static, or initial_density below 1."""

    criterion: str = "random"
    """A name in CRITERIA that needs no gradient, or an import path."""
    distribution: DistributionConfig | None = None
    """None: the rule's own."""

    def __post_init__(self) -> None:
        check_name(self.criterion, CRITERIA, "initial.criterion")
        _require(
            self.criterion not in (*GRADIENT_CRITERIA, "momentum"),
            f"initial.criterion is {self.criterion}; expected one that needs no gradient",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RegrowConfig:
    """At each mask change a share of every matrix's kept weights is dropped and as many grow."""

    criterion: str = "none"
    """none, random (SET), gradient (RigL, GraNet), or an import path; of masked weights, weight and
    moments are 0 and say nothing."""
    share: float = 0.3
    """Dropped at the first change, of the kept weights."""
    final_share: float = 0.0
    """Dropped at `stop`."""
    anneal: str = "cosine"
    """From share to final_share: cosine, or constant (share until stop)."""
    stop: float = 0.75
    """Share of the run after which nothing grows."""
    rounding: str = "down"
    """Of the number dropped: down (RigL) or up (GraNet)."""
    window_steps: int = 1
    """Dense gradients are summed over this many steps before a change."""
    min_tokens: int = 1
    """An expert that saw fewer tokens in the window keeps its mask: its gradient says nothing."""

    def __post_init__(self) -> None:
        check_name(self.criterion, GROWN_BY, "regrow.criterion")
        for name in ("share", "final_share", "stop"):
            _share(f"regrow.{name}", getattr(self, name))
        _one_of("regrow.anneal", self.anneal, ("cosine", "constant"))
        _one_of("regrow.rounding", self.rounding, ("down", "up"))
        for name in ("window_steps", "min_tokens"):
            _at_least(f"regrow.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternConfig:
    """Which shapes of mask there may be. Groups lie along columns, the axis that is summed over."""

    kind: str = "unstructured"
    """unstructured; n_m: n of every m are kept; n_m_floor: at least n of every m are kept, on the
    way to a density of n/m or more; block: whole blocks are kept or not."""
    n: int = 2
    """Kept of every m columns."""
    m: int = 4
    """Columns of a group; they must divide the matrix's."""
    decay: str = "none"
    """n_m, over start to stop in equal frames: stepwise, (m-1):m, m/2:m, ... n:m; or geometric,
    8n:8m, 4n:4m, 2n:2m, n:m."""
    block_rows: int = 1
    """Rows of a block; a divisor of 64, so that no block has two owners."""
    block_columns: int = 1
    """Columns of a block; 0 = whole rows."""

    def __post_init__(self) -> None:
        _one_of("pattern.kind", self.kind, PATTERNS)
        _one_of("pattern.decay", self.decay, PATTERN_DECAYS)
        _require(1 <= self.n < self.m, f"pattern.n is {self.n}; expected 1 to below m={self.m}")
        _require(
            self.decay == "none" or self.kind == "n_m",
            f"pattern.decay is {self.decay} with kind {self.kind}; expected kind n_m",
        )
        halvings = self.m // self.n
        _require(
            self.decay != "stepwise" or (self.m % self.n == 0 and halvings & (halvings - 1) == 0),
            f"pattern is {self.n}:{self.m} with decay stepwise; expected m/n a power of 2",
        )
        _require(
            self.block_rows >= 1 and 64 % self.block_rows == 0,
            f"pattern.block_rows is {self.block_rows}; expected a divisor of 64",
        )
        _at_least("pattern.block_columns", self.block_columns, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """What the forward pass multiplies with, and what gradient reaches a weight that is masked."""

    kind: str = "masked"
    """masked: masked weights are 0 and get no gradient; ste: they live on and get the gradient,
    though the forward pass takes 0 for them; soft: it takes D(t) of them; dense: all of them."""
    decay: float = 0.0
    """Strength of the pull of masked weights towards 0 (SR-STE's lambda); 0 = none."""
    decay_place: str = "gradient"
    """gradient: added to it (SR-STE); decoupled: after the step, times the learning rate; ast: to
    Adam's first moment when it is used; adams: in its place, as the sign of the weight (CAST)."""
    ramp: float = 0.0
    """Share of the run over which `decay` grows linearly from 0."""
    softening: str = "linear"
    """soft: D = max(0, 1 - rate u), or exponential, exp(-rate u), u from 0 to 1 over the schedule's
    start to stop, and 0 afterwards."""
    rate: float = 1.0
    """soft: see softening."""

    def __post_init__(self) -> None:
        _one_of("flow.kind", self.kind, FLOWS)
        _one_of("flow.decay_place", self.decay_place, DECAY_PLACES)
        _one_of("flow.softening", self.softening, SOFTENINGS)
        _share("flow.ramp", self.ramp)
        for name in ("decay", "rate"):
            _at_least(f"flow.{name}", getattr(self, name), 0)
        _require(
            self.decay == 0.0 or self.kind != "masked",
            f"flow.decay is {self.decay} with kind masked; expected 0, masked weights are 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EndConfig:
    """What becomes of the mask at the end."""

    kind: str = "freeze"
    """freeze: it stays as it is; densify (SPDF): all weights take part, from 0, or, where masked
    ones lived, as they are; prune: those that still live under the mask become 0, and so they
    stay."""
    at: float = 1.0
    """Share of the run's steps."""
    reset_moments: bool = False
    """densify: all moments of the rule's matrices become 0, not only those of revived weights.
    Adam's count of steps, which belongs to all weights, goes on."""
    rewarm: float = 0.0
    """densify: share of the run's steps in which the learning rate rises again from 0 to what the
    phase's own curve says; revived weights have a second moment of 0, and without it their first
    step is a leap. For a curve of its own, begin a phase where the mask ends."""

    def __post_init__(self) -> None:
        _one_of("end.kind", self.kind, ENDS)
        _share("end.at", self.at)
        _share("end.rewarm", self.rewarm)
        _require(
            self.kind == "densify" or not (self.reset_moments or self.rewarm),
            f"end.reset_moments and end.rewarm with kind {self.kind}; expected densify",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleConfig:
    """One choice on each axis, for the matrices it matches."""

    match: tuple[str, ...] = ("*_proj.weight",)
    """Globs over checkpoint names; the first rule that matches a matrix has it. Only matrices."""
    exclude: tuple[str, ...] = ()
    """Globs of what stays dense."""
    distribution: DistributionConfig = field(default_factory=DistributionConfig)
    """Densities of matrices."""
    initial: InitialConfig = field(default_factory=InitialConfig)
    """The first mask."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Density over time."""
    criterion: str = "magnitude"
    """What is kept: the highest of a name in CRITERIA, or of an import path."""
    regrow: RegrowConfig = field(default_factory=RegrowConfig)
    """What comes back."""
    pattern: PatternConfig = field(default_factory=PatternConfig)
    """Shapes of masks."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Forward pass and gradient."""
    end: EndConfig = field(default_factory=EndConfig)
    """Afterwards."""

    def __post_init__(self) -> None:
        _require(bool(self.match), "match is empty; expected at least one glob")
        check_name(self.criterion, CRITERIA, "criterion")
        check_together(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityConfig:
    """A run's plan."""

    rules: tuple[RuleConfig, ...] = ()
    """In order; what none matches stays dense. Required by method plan."""
    method: str = "plan"
    """plan, or an import path `package.module:Name` of a SparsityMethod of yours."""
    seed: int = 1
    """Of everything random; the same masks under every topology."""
    total_steps: int | None = None
    """What shares are of; None = the max_steps of all phases together."""
    total_tokens: int | None = None
    """The same for schedule.unit tokens, which needs it."""

    def __post_init__(self) -> None:
        check_name(self.method, SPARSITY_METHODS, "sparsity.method")
        _require(
            bool(self.rules) or self.method != "plan",
            "sparsity.rules is empty; expected at least one rule",
        )
        for name in ("total_steps", "total_tokens"):
            if (value := getattr(self, name)) is not None:
                _at_least(f"sparsity.{name}", value, 1)
        _require(
            self.total_tokens is not None or all(r.schedule.unit != "tokens" for r in self.rules),
            "sparsity.total_tokens is missing; a schedule with unit tokens needs it",
        )
