"""What `gossamer bench replicas` trains: arms, their sizes, and what was tried to tune them.

The one idea: an arm is plain data, so a training that was measured is known again by it, and a grid
that was cut off goes on where it was. Seed 0 tunes; the seeds that are reported never do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gossamer.comm.outer.config import (
    DgcConfig,
    DilocoConfig,
    OuterConfig,
    SparseLocoConfig,
)

MODELS = ("dense", "moe")
LINKS_MBIT = (10, 100, 1000)
DENSITIES = (1 / 128, 1 / 64, 1 / 32, 1 / 8)
"""0.8, 1.6, 3.1 and 12.5 %."""
MAIN_DENSITY, DGC_DENSITY = 1 / 32, 1 / 64
TUNING_SEED = 0
SEEDS: tuple[int, ...] = (1, 2, 3)
ABLATION_SEEDS = (1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of models, data and training; the same for all arms of a grid."""

    replicas: int = 4
    rounds: int = 20
    inner_steps: int = 8
    """Optimizer steps of a round; rules that share every step take as many, too."""
    warmup_steps: int = 20
    rows: int = 4
    """Of a replica in a step."""
    seq_len: int = 64
    hidden: int = 64
    layers: int = 2
    experts: int = 8
    """Of the MoE model, 2 for a token."""
    vocab_size: int = 512
    corpus_chars: int = 3_000_000
    heldout_rows: int = 64

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.rounds * self.inner_steps

    @property
    def step_tokens(self) -> int:
        """Of all replicas in one step."""
        return self.replicas * self.rows * self.seq_len


QUICK = Sizes(rounds=3, inner_steps=2, warmup_steps=1, rows=2, corpus_chars=200_000, heldout_rows=8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train; `rule` ddp is the mean of all gradients at every step."""

    rule: str
    lr: float = 4e-3
    """Peak of the inner AdamW's."""
    density: float | None = None
    error_feedback: bool | None = None
    outer_lr: float | None = None
    """None: the rule's default."""
    momentum: float | None = None
    """Of diloco's outer step, or of dgc's velocity."""
    aggregation: str = "senders"
    clip_to_median: float = 3.0
    absence: str = "keep"
    away: float = 0.0
    """Chance of each replica to miss a round, and what it would have trained in it."""
    leaves: bool = False
    """The last replica leaves for good at half-time."""
    scale: float = 1.0
    """Replica 0 sends so many times what it changed."""
    longer: int = 1
    """Times as many rounds."""

    @property
    def every_step(self) -> bool:
        """Something is sent at every step, not once a round."""
        return self.rule in ("ddp", "dgc")

    def outer(self, number: int, sizes: Sizes) -> OuterConfig:
        """Of replica `number`; ddp has none of its own and takes averaging's."""
        given = {"lr": self.outer_lr, "momentum": self.momentum, "density": self.density}
        given["error_feedback"] = self.error_feedback
        kinds = {"diloco": DilocoConfig, "sparseloco": SparseLocoConfig, "dgc": DgcConfig}
        constants = {}
        if self.rule in kinds:
            own = {name: value for name, value in given.items() if value is not None}
            constants[self.rule] = kinds[self.rule](**own)
        return OuterConfig(
            rule="averaging" if self.rule == "ddp" else self.rule,
            inner_steps=1 if self.every_step else sizes.inner_steps,
            exchange="collective",
            replica=f"replica-{number}",
            expected_replicas=sizes.replicas,
            aggregation=self.aggregation,
            clip_to_median=self.clip_to_median,
            absence=self.absence,
            anchor_every_rounds=1 << 30,
            **constants,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """An arm with one model and seed, and what it is trained for."""

    purpose: str
    """tuning, grid, or the name of a question beside the grid."""
    model: str
    seed: int
    arm: Arm


def sparseloco(density: float = MAIN_DENSITY, error_feedback: bool = True) -> Arm:
    return Arm(rule="sparseloco", density=density, error_feedback=error_feedback)


DGC = Arm(rule="dgc", density=DGC_DENSITY, momentum=0.9)
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
DILOCO_TRIED = ((0.7, 0.9), (0.4, 0.8), (0.7, 0.5), (0.9, 0.3))
"""Outer (learning rate, momentum)."""
SPARSELOCO_TRIED = (1.0, 0.6, 0.4)
"""Outer learning rates."""


def tuning() -> Iterator[Training]:
    """What is tried with the dense model; the MoE model takes what is best there."""
    arms = [
        replace(arm, lr=lr)
        for arm in (Arm(rule="ddp"), Arm(rule="averaging"), DGC)
        for lr in LEARNING_RATES
    ]
    for lr in LEARNING_RATES[:2]:
        arms += [replace(sparseloco(), lr=lr, outer_lr=outer) for outer in SPARSELOCO_TRIED]
        arms += [
            Arm(rule="diloco", lr=lr, outer_lr=outer, momentum=mu) for outer, mu in DILOCO_TRIED
        ]
    for arm in arms:
        yield Training(purpose="tuning", model="dense", seed=TUNING_SEED, arm=arm)


def grid(best: Callable[[str], Arm]) -> Iterator[Training]:
    """The arms of the table; best(rule) is the one that tuning found."""
    for model in MODELS:
        main = best("sparseloco")
        arms = [(best(rule), SEEDS) for rule in ("ddp", "averaging", "diloco", "dgc")]
        arms += [(replace(main, density=density), SEEDS) for density in DENSITIES]
        without = replace(main, error_feedback=False)
        arms += [(replace(without, density=density), ABLATION_SEEDS) for density in DENSITIES]
        for arm, seeds in arms:
            for seed in seeds:
                yield Training(purpose="grid", model=model, seed=seed, arm=arm)


def questions(best: Callable[[str], Arm]) -> Iterator[Training]:
    """What is measured beside the grid, of the dense model alone."""
    main = best("sparseloco")
    whole = (main.outer_lr or 1.0) * 2
    arms = {
        "a quarter away": [replace(main, away=0.25, absence=p) for p in ("keep", "decay", "drop")],
        "one leaves": [replace(main, leaves=True, absence=p) for p in ("keep", "hand_over")],
        "clipping, all honest": [replace(main, clip_to_median=c) for c in (0.0, 1.0, 3.0)],
        "clipping, one sends 1000 times too much": [
            replace(main, clip_to_median=clip, scale=1000.0) for clip in (0.0, 1.0, 3.0)
        ],
        "three times as many rounds": [replace(a, longer=3) for a in (best("averaging"), main)],
        "divided by all replicas": [
            replace(main, aggregation="replicas", outer_lr=lr)
            for lr in (whole / 2, whole, 2 * whole)
        ],
    }
    for purpose, each in arms.items():
        for arm in each:
            for seed in SEEDS if "away" in purpose or "leaves" in purpose else ABLATION_SEEDS:
                yield Training(purpose=purpose, model="dense", seed=seed, arm=arm)
