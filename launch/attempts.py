"""The trainer of a run on a Ray cluster, attempt after attempt, until it is done or given up.

The one idea: this file sees what happens, launch/lifecycle.py says what comes of it. An attempt is
one gang of ranks; when it fails the next one goes on from the newest whole checkpoint, under a new
writer epoch. The cluster stays, and so do the engines: they only follow the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from gossamer.launch.config import RunConfig
from gossamer.launch.controller import REFRESH_S, newest_checkpoint
from gossamer.launch.display import EventTail
from gossamer.launch.engine_room import UnbuiltError, end_of_actor, free_rooms
from gossamer.launch.lifecycle import Event, Failure, State, after, decide
from gossamer.launch.replica import Replica, failure_of
from gossamer.launch.rollout_pool import RolloutPool
from gossamer.trainer.metrics import EventLog
from gossamer.trainer.prepare import load_run_tokenizer
from gossamer.trainer.run_folder import url_of, where_of
from gossamer.trainer.saving import RunPlace
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PATIENCE_S = 10.0
"""Ranks that have not begun by then are told to be waiting, where they have no place."""


class Attempts:
    """Looks after the trainer; `on_look` is called a few times a second."""

    def __init__(
        self, config: RunConfig, run_dir: Path, number: int, on_look: Callable[[], None]
    ) -> None:
        self._config, self._run_dir, self._number = config, run_dir, number
        self._on_look = on_look
        self._events, self._tail = EventLog(run_dir), EventTail(run_dir)
        self._state, self._failures = State.WAITING, list[Failure]()
        self._saved_step = 0
        self._others: set[str] = set()
        """Placement groups that were there before the attempt: of other jobs, say."""
        self._pool: Any = None
        self._pool_end: Any = None
        """Ready once the pool has given up or is dead."""
        # not where a node that dies would take them along, unless it is the driver's own
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._options = {"num_cpus": 0, "scheduling_strategy": here}

    def run(self, resume_from: str | None) -> str | None:
        """Returns None once all phases are done, or why the trainer was given up."""
        while True:
            self._enter(Event.START)
            failure = self._attempt(resume_from)
            if failure is None:
                self._enter(Event.DONE)
                return None
            self._failures.append(Failure(failure.reason, self._saved_step, failure.is_final))
            decision = decide(self._failures, self._config.recovery)
            self._enter(Event.DIED, decision.why)
            if decision.restart_after_s is None:
                self._enter(Event.GIVEN_UP)
                return decision.why
            over_s = time.monotonic() + decision.restart_after_s
            while time.monotonic() < over_s:
                time.sleep(min(REFRESH_S, decision.restart_after_s))
                self._look()
            self._number += 1
            resume_from = newest_checkpoint(self._run_dir, self._config.train.checkpoint.url)

    def _attempt(self, resume_from: str | None) -> Failure | None:
        """One gang of ranks, from its start to its end."""
        config, pool = self._config, self._pool_of_this_attempt()
        place = RunPlace(
            run_dir=self._run_dir,
            name=config.name,
            attempt=self._number,
            resume_from=resume_from,
            url=url_of(self._run_dir),
        )
        replica: Any = ray.remote(Replica).options(**self._options).remote()
        self._others = set(ray.util.placement_group_table())
        try:
            fit = replica.fit.remote(config.train, config.cluster, place, pool)
            watched = [fit, *([self._pool_end] if pool is not None else [])]
            begun_s, is_told = time.monotonic(), False
            has_places: bool | None = None
            while not ray.wait(watched, timeout=REFRESH_S)[0]:
                self._look()
                if not has_places and (has_places := self._have_places()) and pool is not None:
                    pool.open.remote()  # not before: engines might take what only ranks can use
                late = time.monotonic() - begun_s > PATIENCE_S
                if late and not is_told and has_places is False:
                    is_told = self._tell_what_is_lacking()
            self._look(to_end=True)
            return self._pool_failure() or _failure(fit)
        finally:
            ray.kill(replica)  # its ranks, and their places, go with it

    def _pool_of_this_attempt(self) -> Any:  # noqa: ANN401, an actor's handle
        if not self._config.has_rollouts:
            return None
        if self._pool is None:
            config, model = self._config, _engine_model(self._config, self._run_dir)
            pool = ray.remote(RolloutPool).options(**self._options, max_concurrency=8)
            where = where_of(self._run_dir)
            self._pool = pool.remote(where, config.rollout, config.recovery, model)
            self._pool_end = self._pool.watch.remote()
        try:
            ray.get(self._pool.begin_attempt.remote(self._number))
        except ray.exceptions.RayActorError:
            pass  # its end is watched
        return self._pool

    def _pool_failure(self) -> Failure | None:
        """Why the pool cannot go on, if so; one whose process died is made anew next time."""
        if self._pool is None or not ray.wait([self._pool_end], timeout=0)[0]:
            return None
        failure = Failure("the process of the rollout pool was killed or crashed")
        try:
            ray.get(self._pool_end)
        except ray.exceptions.RayTaskError as error:
            return Failure(str(error.cause), is_final=True)
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                end = end_of_actor(error)
                why = f"the rollout pool could not be made: {end}"
                failure = Failure(why, is_final=isinstance(end, UnbuiltError))
        free_rooms()
        self._pool = None
        return failure

    def _look(self, to_end: bool = False) -> None:
        for event in self._tail.read(to_end):
            if event["event"] == "checkpoint":
                self._saved_step = max(self._saved_step, event["step"])
            elif event["event"] == "run_start" and event["attempt"] == self._number:
                if self._state is State.STARTING:  # from a store it may be heard of late
                    self._enter(Event.READY)
        self._on_look()

    def _enter(self, event: Event, why: str = "") -> None:
        self._state = after(self._state, event)
        self._tell(self._state, why)

    def _tell(self, state: State, why: str) -> None:
        told = {"part": "trainer", "state": str(state), "attempt": self._number, "why": why}
        with suppress(OSError):  # a full disk; the display shows what it has
            self._events.write("lifecycle", told)

    def _have_places(self) -> bool | None:
        """Whether Ray Train's placement group has what it asked for; None: it has not asked."""
        if self._state is State.RUNNING:
            return True
        world_size = self._config.train.parallel.world_size
        groups = ray.util.placement_group_table()
        new = [g for key, g in groups.items() if key not in self._others and not g["name"]]
        mine = [g["state"] for g in new if len(g["bundles"]) == world_size]
        there = [state for state in mine if state != "REMOVED"]
        return all(state == "CREATED" for state in there) if there else None

    def _tell_what_is_lacking(self) -> bool:
        cluster, world_size = self._config.cluster, self._config.train.parallel.world_size
        where = f" with labels {dict(cluster.labels)}" if cluster.labels else ""
        free, there = (
            found().get("CPU", 0.0) for found in (ray.available_resources, ray.cluster_resources)
        )
        wanted, has = world_size * cluster.cpus_per_rank, f"{free:g} of the cluster's {there:g}"
        self._tell(State.WAITING, f"the ranks wait for {wanted:g} CPUs{where}; {has} are free")
        return True


def _failure(fit: Any) -> Failure | None:  # noqa: ANN401, an object reference
    try:
        return ray.get(fit)
    except ray.exceptions.RayTaskError as error:
        return failure_of(error.cause)
    except ray.exceptions.RayError:
        return Failure("the process that starts the ranks was killed or crashed")


def _engine_model(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """The Hugging Face config, as a dict, that rollout engines build."""
    from gossamer.trainer.model import hf_config

    tokenizer = load_run_tokenizer(run_dir)
    hf = hf_config(config.train.model, tokenizer.hf_fields())
    # a foreign config may name several tokens that end, or none that pads, or any dtype
    return hf.to_dict() | {
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id or 0,
        "dtype": config.train.log.publish_dtype,
    }
