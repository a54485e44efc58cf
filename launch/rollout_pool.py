"""The rollout pool: engines as Ray actors, a queue of units, and what to do when an engine dies.

The one idea: a unit (a fixed list of requests) is run whole by one engine, and running it again
gives the same samples; so a dead engine costs nothing but time: its unit goes back to the front of
the queue and a new engine catches up from the log before it is given anything. What running again
would not mend (an engine that cannot be built, or that refuses a unit) ends the run, unless prompts
may be given up: then the unit is taken apart, and the prompt that is to blame is left out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import ray
from gossamer.comm.rollout import Request, Sample
from gossamer.launch.config import RecoveryConfig, RolloutConfig
from gossamer.launch.engine_actor import EngineActor
from gossamer.trainer.metrics import EventLog
from gossamer.trainer.run_folder import open_run


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    batch: _Batch
    requests: list[Request]
    oldest_version: int
    failures: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Engine:
    name: str
    actor: Any


@dataclass(slots=True)
class _Batch:
    order: list[str]
    """Of its requests."""
    waited_for: int
    """Requests that are neither sampled nor given up."""
    is_wanted: bool = False
    """The trainer waits for it."""
    is_forgotten: bool = False
    """It was asked for by an attempt that is over."""
    samples: dict[str, Sample] = field(default_factory=dict)


class RolloutPool:
    """RolloutSource for the trainer: a thread an engine gives it units, and replaces it if dead."""

    def __init__(
        self, run_dir: str, rollout: RolloutConfig, recovery: RecoveryConfig, model: dict
    ) -> None:
        self._run_dir, self._rollout, self._model = run_dir, rollout, model
        self._recovery = recovery
        self._events = EventLog(open_run(run_dir))
        self._queue: deque[_Unit] = deque()
        self._batches: dict[str, _Batch] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._started = 0
        self._engines = [self._start("start") for _ in range(rollout.engines)]
        for place in range(rollout.engines):
            threading.Thread(target=self._serve, args=(place,), daemon=True).start()

    def begin_attempt(self) -> None:
        """Forgets what earlier attempts asked for: what they did not save is asked anew."""
        with self._changed:
            for batch in self._batches.values():
                batch.is_forgotten = True
            self._queue.clear()
            self._batches.clear()
            self._changed.notify_all()

    def submit(self, batch: str, units: list[list[Request]], oldest_version: int) -> None:
        """See RolloutSource."""
        with self._changed:
            order = [request.request_id for requests in units for request in requests]
            asked = self._batches[batch] = _Batch(order=order, waited_for=len(order))
            self._queue.extend(_Unit(asked, requests, oldest_version) for requests in units)
            self._changed.notify_all()

    def collect(self, batch: str) -> list[Sample]:
        """See RolloutSource. Raises RuntimeError once the pool has given up."""
        with self._changed:
            wanted = self._batches[batch]
            wanted.is_wanted = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._failure or wanted.is_forgotten or not wanted.waited_for
            )
            self._raise_failure()
            if wanted.is_forgotten:
                raise RuntimeError(f"batch {batch} was asked for by an attempt that is over")
            del self._batches[batch]
            self._changed.notify_all()
        return [wanted.samples[name] for name in wanted.order if name in wanted.samples]

    def audit(self, version: int) -> dict[str, str]:
        """See RolloutSource. An engine that dies meanwhile is replaced and asked again."""
        hashes: dict[str, str] = {}
        for place in range(len(self._engines)):
            while (engine := self._engines[place]).name not in hashes:
                self._raise_failure()
                try:
                    hashes[engine.name] = ray.get(engine.actor.audit.remote(version))
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError as error:
                    self._replace(engine, error)
        return hashes

    def watch(self) -> None:
        """Waits until the pool has given up, and raises RuntimeError that says why."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure)
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(self._failure)

    def _start(self, what: str) -> _Engine:
        name = f"engine-{self._started}"
        self._started += 1
        options = {"num_cpus": self._rollout.num_cpus, "max_concurrency": 2}
        actor = (
            ray.remote(EngineActor)
            .options(**options)
            .remote(name, self._run_dir, self._rollout, self._model)
        )
        self._events.write("engine", {"engine": name, "what": what, "version": None})
        return _Engine(name, actor)

    def _serve(self, place: int) -> None:
        """What the thread of one place runs; whatever ends it reaches those who wait."""
        try:
            while self._failure is None:
                self._run_units(self._engines[place])
        except BaseException as error:
            reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            self._fail(f"{self._engines[place].name} failed: {reason}")

    def _run_units(self, engine: _Engine) -> None:
        """Gives units to an engine until it dies, then replaces it."""
        unit: _Unit | None = None
        try:
            ray.get(engine.actor.__ray_ready__.remote())
            while (unit := self._next_unit(engine)) is not None:
                try:
                    samples = ray.get(engine.actor.run.remote(unit.requests, unit.oldest_version))
                except ray.exceptions.RayTaskError as error:
                    if not self._rollout.prompt_retries:
                        raise
                    self._try_again(engine, unit, str(error.cause))
                else:
                    self._take(unit.batch, samples, len(unit.requests))
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            if unit is not None:
                self._try_again(engine, unit, "the engine died")
            self._replace(engine, error)

    def _take(self, batch: _Batch, samples: list[Sample], num_requests: int) -> None:
        with self._changed:
            batch.samples |= {sample.request_id: sample for sample in samples}
            batch.waited_for -= num_requests
            self._changed.notify_all()

    def _try_again(self, engine: _Engine, unit: _Unit, reason: str) -> None:
        """Puts a failed unit back: as it is, or its prompts alone, or not those that failed often.

        The prompts of a unit that failed as a whole are told apart by running each alone.
        """
        retries = self._rollout.prompt_retries
        prompts = [unit.requests]
        if retries:
            prompts = [list(each) for _, each in groupby(unit.requests, lambda r: r.prompt_ids)]
            if unit.failures >= retries and len(prompts) == 1:
                told = {"what": "prompt_lost", "version": None, "reason": reason}
                request_id = unit.requests[0].request_id
                self._events.write("engine", {"engine": engine.name, "request": request_id, **told})
                return self._take(unit.batch, [], len(unit.requests))
        failures = unit.failures + bool(retries)
        again = [_Unit(unit.batch, each, unit.oldest_version, failures) for each in prompts]
        with self._changed:
            if not unit.batch.is_forgotten:
                self._queue.extendleft(reversed(again))
            self._changed.notify_all()

    def _next_unit(self, engine: _Engine) -> _Unit | None:
        """Waits for a unit; None once the pool has given up."""
        start_s = time.perf_counter()
        with self._changed:
            is_held = bool(self._queue) and self._first() is None
            self._changed.wait_for(lambda: self._failure or self._first() is not None)
            unit = None if self._failure else self._first()
            if unit is not None:
                self._queue.remove(unit)
        if is_held:
            told = {"what": "held", "version": None, "held_s": time.perf_counter() - start_s}
            self._events.write("engine", {"engine": engine.name, **told})
        return unit

    def _first(self) -> _Unit | None:
        """The next unit: of what the trainer waits for, else the oldest, unless enough is ready."""
        wanted = (unit for unit in self._queue if unit.batch.is_wanted)
        if (unit := next(wanted, None)) is not None:
            return unit
        most = self._rollout.max_waiting_samples
        unasked = sum(len(b.samples) for b in self._batches.values() if not b.is_wanted)
        return self._queue[0] if self._queue and (most is None or unasked < most) else None

    def _replace(self, engine: _Engine, error: ray.exceptions.RayError) -> None:
        """Starts an engine in the place of a dead one, unless somebody did or there were enough."""
        with self._changed:
            if engine not in self._engines:
                return
            reason = str(error).strip().splitlines()[-1]
            dead = {"engine": engine.name, "what": "dead", "version": None, "reason": reason}
            self._events.write("engine", dead)
            if getattr(error, "actor_init_failed", False):
                self._fail(f"{engine.name} could not be built: {reason}")
            elif self._started - self._rollout.engines >= self._rollout.max_replacements:
                limit = self._rollout.max_replacements
                self._fail(f"{engine.name} died too, after rollout.max_replacements={limit} others")
            else:
                ray.kill(engine.actor)  # an actor out of reach would keep its CPUs
                self._engines[self._engines.index(engine)] = self._start("replaced")

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()
