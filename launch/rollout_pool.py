"""The rollout pool: engines as Ray actors, a queue of units, and what to do when an engine dies.

The one idea: a unit (a fixed list of requests) is run whole by one engine, and running it again
gives the same samples; so a dead engine costs nothing but time: its unit goes back to the front of
the queue and a new engine catches up from the log before it is given anything. What running again
would not mend (an engine that cannot be built, or that refuses a unit) ends the run.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from gossamer.comm.rollout import Request, Sample
from gossamer.launch.config import RolloutConfig
from gossamer.trainer.metrics import EventLog
from gossamer.trainer.prepare import LOG_FOLDER


def write_pid(run_dir: Path, role: str) -> None:
    """Leaves this process's id in RUN_DIR/pids/ROLE, for whoever has to find it."""
    folder = run_dir / "pids"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / role).write_text(str(os.getpid()))


class EngineActor:
    """One rollout engine; a thread follows the log while another samples."""

    def __init__(self, name: str, run_dir: str, rollout: RolloutConfig, model: dict) -> None:
        import torch
        from gossamer.comm.log import WeightLog
        from gossamer.comm.rollout import ROLLOUT_ENGINES
        from gossamer.trainer.import_path import resolve

        torch.set_num_threads(1)
        write_pid(Path(run_dir), name)
        self._events, self._name = EventLog(Path(run_dir)), name
        self._log = WeightLog.open(Path(run_dir) / LOG_FOLDER)
        self._version: int | None = None
        build = resolve(rollout.engine, ROLLOUT_ENGINES, "rollout.engine")
        ids = {"pad_id": model["pad_token_id"], "eos_id": model["eos_token_id"]}
        self._engine = build(model, self._log, **ids)
        self._moving = threading.Lock()
        threading.Thread(target=self._follow_for_ever, daemon=True).start()

    def run(self, requests: list[Request], oldest_version: int) -> list[Sample]:
        """Samples a unit at `oldest_version` or newer."""
        while self._version is None or self._version < oldest_version:
            if not self._follow():
                time.sleep(0.01)
        start_s = time.perf_counter()
        samples = self._engine.generate(requests)
        self._event(
            "generate",
            samples=len(samples),
            tokens=sum(len(sample.token_ids) for sample in samples),
            generate_s=time.perf_counter() - start_s,
        )
        return samples

    def audit(self, version: int) -> str:
        """State hash of the live weights once they are at `version`."""
        while self._version != version:
            if not self._follow():
                time.sleep(0.01)
        return self._engine.audit()

    def _follow_for_ever(self) -> None:
        while True:
            if not self._follow():
                time.sleep(0.02)

    def _follow(self) -> bool:
        """Stages and commits the next version; False when there is none."""
        with self._moving:
            version = self._log.next_version(self._version)
            if version is None:
                return False
            start_s = time.perf_counter()
            hop, manifest = self._log.hop(self._version, version), self._log.manifest(version)
            self._engine.stage(version)
            stage_s = time.perf_counter() - start_s
            committed = self._engine.commit()
            self._version = version
            self._event(
                "commit",
                bytes=hop.nbytes if hop else 0,
                density=manifest.num_changed / manifest.num_elements,
                stage_s=stage_s,
                pause_s=committed.pause_s,
            )
            return True

    def _event(self, what: str, **fields: Any) -> None:  # noqa: ANN401
        named = {"engine": self._name, "what": what, "version": self._version}
        self._events.write("engine", {**named, **fields})


@dataclass(frozen=True, slots=True)
class _Unit:
    batch: str
    index: int
    requests: list[Request]
    oldest_version: int


@dataclass(frozen=True, slots=True, eq=False)
class _Engine:
    name: str
    actor: Any


@dataclass(slots=True)
class _Batch:
    num_units: int
    done: dict[int, list[Sample]] = field(default_factory=dict)


class RolloutPool:
    """RolloutSource for the trainer: a thread an engine gives it units, and replaces it if dead."""

    def __init__(self, run_dir: str, rollout: RolloutConfig, model: dict) -> None:
        self._run_dir, self._rollout, self._model = run_dir, rollout, model
        self._events = EventLog(Path(run_dir))
        self._queue: deque[_Unit] = deque()
        self._batches: dict[str, _Batch] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._started = 0
        self._engines = [self._start("start") for _ in range(rollout.engines)]
        for place in range(rollout.engines):
            threading.Thread(target=self._serve, args=(place,), daemon=True).start()

    def submit(self, batch: str, units: list[list[Request]], oldest_version: int) -> None:
        """See RolloutSource."""
        with self._changed:
            self._batches[batch] = _Batch(num_units=len(units))
            self._queue.extend(
                _Unit(batch, index, requests, oldest_version)
                for index, requests in enumerate(units)
            )
            self._changed.notify_all()

    def collect(self, batch: str) -> list[Sample]:
        """See RolloutSource. Raises RuntimeError once the pool has given up."""
        with self._changed:
            wanted = self._batches[batch]
            self._changed.wait_for(lambda: self._failure or len(wanted.done) == wanted.num_units)
            self._raise_failure()
            del self._batches[batch]
        return [sample for index in sorted(wanted.done) for sample in wanted.done[index]]

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
            while (unit := self._next_unit()) is not None:
                samples = ray.get(engine.actor.run.remote(unit.requests, unit.oldest_version))
                with self._changed:
                    self._batches[unit.batch].done[unit.index] = samples
                    self._changed.notify_all()
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            with self._changed:
                if unit is not None:
                    self._queue.appendleft(unit)
                    self._changed.notify_all()
            self._replace(engine, error)

    def _next_unit(self) -> _Unit | None:
        """Waits for a unit; None once the pool has given up."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._failure)
            return None if self._failure else self._queue.popleft()

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
