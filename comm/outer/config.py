"""What replicas over thin links can be told. Torch-free, so `gossamer validate` stays quick."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

AGGREGATIONS = ("senders", "replicas")
LATE_POLICIES = ("next", "drop")
ABSENCE_POLICIES = ("keep", "decay", "drop", "hand_over")


def _expect(good: bool, what: str, value: object) -> None:
    if not good:
        raise ValueError(f"{what}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragingConfig:
    """Plain averaging: weights - lr * mean."""

    lr: float = 1.0
    """Outer learning rate; 1 makes the weights the mean of the replicas' weights."""

    def __post_init__(self) -> None:
        _expect(self.lr > 0, "averaging.lr must be above 0", self.lr)


@dataclass(frozen=True, kw_only=True, slots=True)
class DilocoConfig:
    """DiLoCo: Nesterov momentum over the rounds' means."""

    lr: float = 0.7
    """Outer learning rate. Tune it with the momentum: the published pair is no good everywhere."""
    momentum: float = 0.9
    """Share of the outer momentum that is left after a round."""

    def __post_init__(self) -> None:
        _expect(self.lr > 0, "diloco.lr must be above 0", self.lr)
        _expect(0 <= self.momentum < 1, "diloco.momentum must be in [0, 1)", self.momentum)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseLocoConfig:
    """SparseLoCo: the largest elements of each block in 2 bits, the rest waits in a buffer."""

    lr: float = 1.0
    """Outer learning rate; aggregation `replicas` wants about as many times more as there are
    replicas, because few elements are sent by more than one."""
    density: float = 0.03125
    """Share of each block of 4096 elements that is sent: 1/64 is 64 of them, 1/32 is 128."""
    error_decay: float = 0.95
    """Share of the error buffer that goes into the next round."""
    error_feedback: bool = True
    """False forgets what was not sent: for comparison only."""

    def __post_init__(self) -> None:
        _expect(self.lr > 0, "sparseloco.lr must be above 0", self.lr)
        _expect(0 < self.density <= 1, "sparseloco.density must be in (0, 1]", self.density)
        _expect(
            0 <= self.error_decay <= 1, "sparseloco.error_decay must be in [0, 1]", self.error_decay
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DgcConfig:
    """Deep Gradient Compression: every step's gradient, its momentum taken before the selection."""

    density: float = 0.001
    """Share of each block of 4096 elements that is sent, at least one."""
    momentum: float = 0.9
    """Momentum of the local velocity. The optimizer behind it must have none of its own."""
    warmup_densities: tuple[float, ...] = (0.25, 0.0625, 0.015625, 0.004)
    """Densities of the first steps, one after the other."""
    warmup_steps: int = 0
    """Steps at each of them; 0 starts at `density`."""
    max_norm: float = 0.0
    """Norm that a replica's gradient of one tensor is clipped to before it is added up; 0: none."""

    def __post_init__(self) -> None:
        for field_name in ("density", "warmup_densities"):
            value = getattr(self, field_name)
            densities = value if isinstance(value, tuple) else (value,)
            _expect(
                all(0 < d <= 1 for d in densities), f"dgc.{field_name} must be in (0, 1]", value
            )
        _expect(0 <= self.momentum < 1, "dgc.momentum must be in [0, 1)", self.momentum)
        _expect(self.warmup_steps >= 0, "dgc.warmup_steps must be 0 or more", self.warmup_steps)
        _expect(self.max_norm >= 0, "dgc.max_norm must be 0 or more", self.max_norm)


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterConfig:
    """How replicas that share no fast link train one model."""

    rule: str = "sparseloco"
    """A name in OUTER_RULES (averaging, diloco, sparseloco, dgc) or an import path."""
    inner_steps: int = 30
    """Optimizer steps between two outer steps (H); `dgc` runs at every step and wants 1."""
    aggregation: str = "senders"
    """`senders`: the mean of an element over the messages that hold it; `replicas`: its sum over
    the number of messages in the round."""
    clip_to_median: float = 3.0
    """What a message holds of a tensor is scaled down to at most this many times the median norm
    over the round's messages: 1 for open doors, 3 leaves honest replicas alone; 0 never clips."""
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    diloco: DilocoConfig = field(default_factory=DilocoConfig)
    sparseloco: SparseLocoConfig = field(default_factory=SparseLocoConfig)
    dgc: DgcConfig = field(default_factory=DgcConfig)
    exchange: str = "log"
    """A name in EXCHANGES: `log` (a store, replicas may come and go) or `collective`."""
    url: str | None = None
    """Where rounds are kept: a folder, s3://, gs://, az:// or http://; None is RUN_DIR/rounds. With
    `collective` where replicas meet: tcp://HOST:PORT of the first, or a folder that all share."""
    signing_key_path: str | None = None
    """File of this replica's Ed25519 private key (`gossamer log keygen`): what it writes is signed,
    and what the members did not sign is refused. None signs nothing and believes everybody."""
    public_keys_path: str | None = None
    """File of the public keys of all members (cat *.pub); None: all have the same private key."""
    replica: str = "replica-0"
    """This replica's name: letters, digits, `_` and `-`. One that returns keeps its name."""
    expected_replicas: int = 1
    """Replicas that the first round waits for, until its deadline."""
    quorum: int = 1
    """Messages without which no round is settled."""
    grace_s: float = 30.0
    """How long a settled quorum waits for those who took part of late."""
    deadline_s: float = 600.0
    """How long a round waits for its quorum before the replica gives up."""
    expected_for_rounds: int = 2
    """A replica is waited for while one of this many last rounds counted it."""
    late: str = "next"
    """A message that missed its round counts in the next one, or is dropped."""
    absence: str = "keep"
    """The error buffer of a replica that missed rounds: kept, decayed by error_decay a round,
    dropped, or (hand_over) left in the store by one that leaves, for another to take on."""
    anchor_every_rounds: int = 10
    """Rounds between two anchors: whole weights and momentum, for those who come or return."""
    keep_anchors: int = 2
    """Messages and anchors behind so many newest anchors go after ten minutes; 0 keeps all."""
    poll_s: float = 0.2
    """Time between two looks at the store while waiting."""

    def __post_init__(self) -> None:
        choices = {
            "aggregation": AGGREGATIONS,
            "late": LATE_POLICIES,
            "absence": ABSENCE_POLICIES,
        }
        for name, allowed in choices.items():
            expected = f"{name} must be one of {', '.join(allowed)}"
            _expect(getattr(self, name) in allowed, expected, getattr(self, name))
        counts = "inner_steps expected_replicas quorum expected_for_rounds anchor_every_rounds"
        for name in counts.split():
            value = getattr(self, name)
            _expect(value >= 1, f"{name} must be at least 1", value)
        for name in ("deadline_s", "poll_s"):
            _expect(getattr(self, name) > 0, f"{name} must be above 0", getattr(self, name))
        for name in ("grace_s", "clip_to_median", "keep_anchors"):
            _expect(getattr(self, name) >= 0, f"{name} must be 0 or more", getattr(self, name))
        well_named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.replica) is not None
        _expect(well_named, "replica must be letters, digits, _ and -", self.replica)
        if self.exchange == "collective":
            keyless = self.signing_key_path is None
            expected = "signing_key_path must be null with exchange collective, which signs nothing"
            _expect(keyless, expected, self.signing_key_path)
        if self.signing_key_path is None:
            expected = "public_keys_path needs a signing_key_path"
            _expect(self.public_keys_path is None, expected, self.public_keys_path)
        if self.rule == "dgc":
            _expect(self.inner_steps == 1, "inner_steps must be 1 with rule dgc", self.inner_steps)
            fixed = self.exchange == "collective"
            _expect(fixed, "exchange must be collective with rule dgc", self.exchange)
