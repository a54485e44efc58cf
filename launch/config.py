"""What a whole run can be told: training, rollouts and the cluster. No torch, no Ray here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from gossamer.trainer.config import TrainConfig

ON_NEW_VERSION = ("keep", "wait", "recompute", "abort")


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def check_url(url: object) -> str:
    """A server's URL without a slash at its end. Raises ValueError."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r}: expected http(s)://host[:port]")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"the URL of {parts.hostname} holds more than http(s)://host[:port][/path]"
        )
    return str(url).rstrip("/")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Engines of one kind; what is None is as `rollout` has it."""

    name: str
    """Begins the names of its engines; `gossamer engines RUN_DIR NAME=N` grows and shrinks it."""
    engine: str | None = None
    engine_options: Mapping[str, Any] | None = None
    engines: int | None = None
    """With `urls` None is 0."""
    num_cpus: float | None = None
    num_gpus: float | None = None
    labels: Mapping[str, str] | None = None
    urls: tuple[str, ...] = ()
    """vLLM servers that run anyway and follow the log by `gossamer log follow`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ValueError(
                f"name is {self.name!r}; expected letters, digits, dots, dashes and underscores"
            )
        for name in ("engines", "num_cpus", "num_gpus"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} of pool {self.name} is {value}; expected 0 or more")
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(
                f"num_gpus of pool {self.name} is {self.num_gpus}; expected a part of 1, or a whole"
                " number"
            )
        for key, value in (self.labels or {}).items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"labels of pool {self.name}: {key}={value!r}; expected words")
        if len({check_url(url) for url in self.urls}) < len(self.urls):
            raise ValueError(f"urls of pool {self.name} are {self.urls}; expected each once")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """The pools of rollout engines, for recipes with a grpo phase."""

    engine: str = "hf"
    """A name in comm/rollout.py."""
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """What the engine is told besides; vllm: vLLM's engine arguments, as tensor_parallel_size."""
    engines: int = 2
    """How many engines sample in parallel; each is one Ray actor."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves for an engine."""
    num_gpus: float = 0.0
    """GPUs that Ray reserves for an engine, 0.5 for two engines on one."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of Ray's nodes that engines may run on, {"zone": "a"}; Ray's selectors, "!a" and "in(a,b)",
    too."""
    pools: tuple[PoolConfig, ...] = ()
    """Several kinds of engines; none: one pool called `engine`, as the fields here say."""
    max_behind: int | None = None
    """An engine that is more versions than this behind the log gets no more units, finishes its
    own, and is started anew. None: however far."""
    audit_every_versions: int = 0
    """Every so many versions an engine hashes its live weights; one that does not hold the log's
    bits is started anew, and its unit run again. 0: never."""
    prompt_retries: int = 0
    """How often a prompt is tried again, alone, after the engine that had it raised an error or
    died, before it is left out of its step. 0: an error ends the run, deaths are not counted."""
    on_new_version: str = "keep"
    """What a new version does to the unit an engine is sampling. keep: it is taken between two
    tokens; wait: after the unit; recompute: the tokens so far are kept and the rest is sampled
    with keys and values computed anew; abort: the whole unit is sampled again."""
    unit_timeout_s: float = 3600.0
    """An engine that has a unit, or hashes its weights, for longer counts as dead."""
    start_timeout_s: float = 7200.0
    """So does one that, in its place, is not built or has not caught up with the log by then: more
    than an anchor takes to arrive, and a large model to be built."""
    public_key_path: str | None = None
    """Engines follow only what the owner of this key signed (train.log.signing_key_path)."""
    max_cuts: int = 3
    """How often recompute or abort may stop one unit; after that versions wait for it."""
    max_waiting_samples: int | None = None
    """Engines stop once so many samples are ready that the trainer has not asked for, until it
    does. None: max_staleness + 1 batches are the bound."""

    def __post_init__(self) -> None:
        if self.engines < 1:
            raise ValueError(f"rollout.engines is {self.engines}; expected at least 1")
        for name in ("num_cpus", "num_gpus", "prompt_retries", "max_cuts", "audit_every_versions"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"rollout.{name} is {value}; expected 0 or more")
        for name in ("unit_timeout_s", "start_timeout_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"rollout.{name} is {value}; expected more than 0 seconds")
        if self.max_behind is not None and self.max_behind < 1:
            raise ValueError(
                f"rollout.max_behind is {self.max_behind}; expected 1 or more, or null"
            )
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"rollout.pools are called {names}; expected each name once")
        if not any(pool.engines or pool.urls for pool in self.all_pools):
            raise ValueError("rollout.pools hold no engine; expected at least one")
        for pool in self.all_pools:
            if pool.engine == "hf" and pool.engine_options:
                raise ValueError(
                    f"engine_options of pool {pool.name} are {dict(pool.engine_options)}; expected"
                    " none, for engine hf has none"
                )
        if self.on_new_version not in ON_NEW_VERSION:
            raise ValueError(
                f"rollout.on_new_version is {self.on_new_version}; expected one of {ON_NEW_VERSION}"
            )
        if self.max_waiting_samples is not None and self.max_waiting_samples < 1:
            raise ValueError(
                f"rollout.max_waiting_samples is {self.max_waiting_samples}; expected 1 or more, or"
                " null"
            )

    @property
    def all_pools(self) -> tuple[PoolConfig, ...]:
        """Every pool, with nothing left None."""
        pools = self.pools or (PoolConfig(name="engine"),)
        return tuple(self._filled(pool) for pool in pools)

    def _filled(self, pool: PoolConfig) -> PoolConfig:
        engines = 0 if pool.urls and pool.engines is None else pool.engines
        engine = self.engine if pool.engine is None else pool.engine
        options = self.engine_options if pool.engine_options is None else pool.engine_options
        return replace(
            pool,
            engine=engine,
            engine_options=options,
            engines=self.engines if engines is None else engines,
            num_cpus=self.num_cpus if pool.num_cpus is None else pool.num_cpus,
            num_gpus=self.num_gpus if pool.num_gpus is None else pool.num_gpus,
            labels=self.labels if pool.labels is None else pool.labels,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Which Ray cluster runs it."""

    address: str | None = None
    """Ray address to join (`auto`, or ray://host:port); None starts a cluster on this machine."""
    cpus_per_rank: float = 1.0
    """CPUs that Ray reserves for a trainer rank."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have to be given ranks, as `ray start --labels` sets them."""

    def __post_init__(self) -> None:
        if self.cpus_per_rank < 0:
            raise ValueError(f"cluster.cpus_per_rank is {self.cpus_per_rank}; expected 0 or more")
        for key, value in self.labels.items():
            if not isinstance(value, str):
                raise ValueError(f'cluster.labels.{key} is {value}; expected a word, as "{value}"')


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryConfig:
    """When a part of the run that died (the trainer, an engine, one replica of several) is started
    again; launch/lifecycle.py decides."""

    max_failures: int = 5
    """So often in a row without having achieved anything; then it is given up. 0: at once."""
    pause_s: float = 1.0
    """Before it is started again; doubles with every failure in a row."""
    max_pause_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_failures", "pause_s"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"recovery.{name} is {value}; expected 0 or more")
        if self.max_pause_s < self.pause_s:
            raise ValueError(
                f"recovery.max_pause_s is {self.max_pause_s}; expected at least"
                f" recovery.pause_s={self.pause_s}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """How several replicas of a run are looked after."""

    link_mbit: float | None = None
    """Each replica reaches the rounds through a link of so many megabits a second, on this machine;
    None: as fast as it goes."""

    def __post_init__(self) -> None:
        if self.link_mbit is not None and self.link_mbit <= 0:
            raise ValueError(f"fleet.link_mbit is {self.link_mbit}; expected a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A recipe: the whole of what `gossamer train` and `gossamer rl` read."""

    name: str
    """Names the run, its folder (runs/NAME) and its weight log."""
    train: TrainConfig
    """The replica."""
    replicas: int = 1
    """Replicas that train one model in rounds (train.outer), each a run of its own."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    """How they are looked after, where there are several."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What is started again."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The engines."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines."""

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ValueError(
                f"name is {self.name!r}; expected letters, digits, dots, dashes and underscores"
            )
        if self.replicas < 1:
            raise ValueError(f"replicas is {self.replicas}; expected at least 1")
        if self.replicas > 1:
            self._check_fleet()

    def _check_fleet(self) -> None:
        outer, data = self.train.outer, self.train.data
        if outer is None:
            raise ValueError(f"replicas is {self.replicas}; expected 1, or a train.outer section")
        if 1 < data.num_replicas < self.replicas:
            raise ValueError(
                f"train.data.num_replicas is {data.num_replicas}; expected 1 or at least"
                f" replicas={self.replicas}, for each reads documents of its own"
            )
        if outer.exchange == "collective" and data.num_replicas not in (1, self.replicas):
            raise ValueError(
                f"train.data.num_replicas is {data.num_replicas}; expected replicas={self.replicas}"
                " with train.outer.exchange collective, whose members are fixed"
            )
        if self.fleet.link_mbit is not None and (outer.url, outer.exchange) != (None, "log"):
            raise ValueError(
                "fleet.link_mbit needs rounds in the run's own folder; expected no train.outer.url"
                " and train.outer.exchange log"
            )

    @property
    def has_rollouts(self) -> bool:
        """Whether any phase samples from engines."""
        return any(phase.kind == "grpo" for phase in self.train.phases)
