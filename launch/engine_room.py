"""Where an engine runs: a Ray placement group of one bundle, which outlives the engines in it.

The one idea: a place is asked for once. An engine that dies leaves it to the next one, so nobody
else takes its CPUs or its share of a GPU meanwhile; of a place whose node died Ray makes another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import ray
from gossamer.comm.rollout import Request, Sample
from gossamer.launch.config import PoolConfig, RolloutConfig
from gossamer.launch.engine_actor import EngineActor, UnfitError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

ROOM = "gossamer-engine-"
"""What names of placement groups begin with."""
TICK_S = 1.0
"""Between two looks at an engine."""
SILENCE_S = 120.0
"""An engine that does not say its version for so long counts as dead."""


class LostError(RuntimeError):
    """An engine that died, or cannot be reached."""


class UnbuiltError(LostError):
    """An engine whose constructor raised what has nothing to do with disks and stores."""


class ActorRoom:
    """Room for one engine of a pool."""

    def __init__(self, pool: PoolConfig, run_dir: str, rollout: RolloutConfig, model: dict) -> None:
        assert pool.engine is not None and pool.engine_options is not None  # all_pools fills them
        self._unit_timeout_s = rollout.unit_timeout_s
        own = replace(rollout, engine=pool.engine, engine_options=pool.engine_options, pools=())
        self._resources = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
        self._arguments = run_dir, own, model
        bundle = {"CPU": pool.num_cpus or 0.0, "GPU": pool.num_gpus or 0.0}
        bundle = {name: amount for name, amount in bundle.items() if amount}
        self.waits_for = wanted_words(bundle, pool)
        # a bundle must hold something: a byte
        labels = [dict(pool.labels)] if pool.labels else None
        self._group = placement_group(
            [bundle or {"memory": 1}], bundle_label_selector=labels, name=f"{ROOM}{uuid4().hex}"
        )

    def is_ready(self) -> bool:
        """Waits for a tick at most."""
        return self._group.wait(TICK_S)

    def start(self, name: str, is_anew: bool) -> ActorEngine:
        """The next engine of the place; `is_anew`: in place of one that was unfit."""
        where = PlacementGroupSchedulingStrategy(self._group, 0)
        # beside units: audits, looks, and catching up
        options = {**self._resources, "max_concurrency": 4, "scheduling_strategy": where}
        actor = ray.remote(EngineActor).options(**options).remote(name, *self._arguments)
        return ActorEngine(name, actor, is_anew, self._unit_timeout_s)

    def close(self) -> None:
        """Gives the place back."""
        with suppress(ray.exceptions.RayError):
            remove_placement_group(self._group)


class ActorEngine:
    """An engine that is an actor. All but `stop` raise LostError, UnfitError, or what it raised."""

    waits_for = ""
    """Nothing that would have to be told."""
    poll_s = TICK_S

    def __init__(self, name: str, actor: Any, is_anew: bool, unit_timeout_s: float) -> None:  # noqa: ANN401
        self.name, self._unit_timeout_s = name, unit_timeout_s
        self.version: int | None = None
        self.behind = 0
        """Versions, at the last look."""
        self._actor = actor
        self._caught_up = actor.catch_up.remote(is_anew)
        self._looked: Any = None
        self._asked_s, self._head = 0.0, -1

    def is_ready(self) -> bool:
        """Whether it has caught up with the log; waits for a tick at most."""
        if not ray.wait([self._caught_up], timeout=TICK_S)[0]:
            return False
        self.version = _get(self._caught_up)
        return True

    def can_run(self, oldest_version: int) -> bool:
        """It follows by itself while a unit waits for its version."""
        return True

    def look(self, head: int) -> None:
        """Learns its version, and how far it is behind what was the head when it was asked.

        Waits for nothing; raises LostError for one that has been silent for long.
        """
        if self._looked is None:
            self._looked = self._actor.status.remote()
            self._asked_s, self._head = time.monotonic(), head
        if ray.wait([self._looked], timeout=0)[0]:
            looked, self._looked = self._looked, None
            self.version, fault = _get(looked)
            self.behind = self._head - (-1 if self.version is None else self.version)
            if fault is not None:
                raise UnfitError(fault)
        elif time.monotonic() - self._asked_s > SILENCE_S:
            raise LostError(f"{self.name} has not answered for {SILENCE_S:g} s")

    def run(
        self, requests: list[Request], oldest_version: int, on_tick: Callable[[], None]
    ) -> list[Sample]:
        """Samples of a unit; calls `on_tick` every second until they are there."""
        running = self._actor.run.remote(requests, oldest_version)
        deadline_s = time.monotonic() + self._unit_timeout_s
        while not ray.wait([running], timeout=TICK_S)[0]:
            on_tick()
            if time.monotonic() > deadline_s:
                raise self._is_late("sampled a unit")
        return _get(running)

    def audit(self, version: int) -> str | None:
        """State hash of the live weights at `version`."""
        hashed = self._actor.audit.remote(version)
        if not ray.wait([hashed], timeout=self._unit_timeout_s)[0]:
            raise self._is_late("hashed its weights")
        return _get(hashed)

    def _is_late(self, what: str) -> LostError:
        most = f"rollout.unit_timeout_s={self._unit_timeout_s:g}"
        return LostError(f"{self.name} has not {what} in {most}")

    def stop(self) -> None:
        """Whatever it does; an actor out of reach would keep its CPUs."""
        ray.kill(self._actor)


def free_rooms() -> None:
    """Gives back the places of a pool that was killed: Ray keeps them while their job lives."""
    for group in placement_group_table().values():
        if group["name"].startswith(ROOM) and group["state"] != "REMOVED":
            with suppress(ValueError):  # another job's
                remove_placement_group(get_placement_group(group["name"]))


def wanted_words(bundle: dict[str, float], pool: PoolConfig) -> str:
    """1 CPU and 0.5 GPUs on a node with zone=a."""
    amounts = [f"{n:g} {name}{'s' * (n != 1)}" for name, n in bundle.items()]
    labels = ", ".join(f"{key}={value}" for key, value in (pool.labels or {}).items())
    return " and ".join(amounts or ["room"]) + (f" on a node with {labels}" if labels else "")


def _get(reference: Any) -> Any:  # noqa: ANN401
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):  # a full disk, a store that is away, not the unit
            raise LostError(str(error.cause)) from None
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise end_of_actor(error) from None


def end_of_actor(error: Exception) -> LostError:
    """What became of an actor, by what Ray says. It tells what a constructor raised in words alone:
    the traceback, whose last line begins with the class."""
    reason = str(error).strip().splitlines()[-1]
    raised = reason.partition(":")[0].rpartition(".")[2]
    is_unbuilt = getattr(error, "actor_init_failed", False) and raised not in _names(OSError)
    return (UnbuiltError if is_unbuilt else LostError)(reason)


def _names(kind: type) -> set[str]:
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))
