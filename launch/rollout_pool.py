"""The rollout pool: engines as Ray actors, a queue of units, and what to do when an engine dies.

The one idea: a unit (a fixed list of requests) is run whole by one engine, and running it again
gives the same samples; so a dead engine costs nothing but time: its unit goes back to the front of
the queue and a new engine catches up from the log before it is given anything.
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


@ray.remote
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
            self._engine.stage(version)
            stage_s = time.perf_counter() - start_s
            committed = self._engine.commit()
            manifest, base = self._log.manifest(version), self._version
            goes_on = manifest.delta and manifest.base_version == base
            frames = manifest.delta if goes_on else manifest.anchor
            self._version = version
            self._event(
                "commit",
                bytes=sum(frame.nbytes for frame in frames),
                density=manifest.num_changed / manifest.num_elements,
                stage_s=stage_s,
                pause_s=committed.pause_s,
            )
            return True

    def _event(self, what: str, **fields: Any) -> None:  # noqa: ANN401
        named = {"engine": self._name, "what": what, "version": self._version}
        self._events.write("engine", {**named, **fields})


@dataclass(slots=True)
class _Unit:
    batch: str
    index: int
    requests: list[Request]
    oldest_version: int


@dataclass(slots=True)
class _Engine:
    name: str
    actor: Any
    unit: _Unit | None = None
    running: ray.ObjectRef | None = None


@dataclass(slots=True)
class _Batch:
    num_units: int
    done: dict[int, list[Sample]] = field(default_factory=dict)


@ray.remote(max_concurrency=8)
class RolloutPool:
    """RolloutSource for the trainer; its own loop runs in a thread."""

    def __init__(self, run_dir: str, rollout: RolloutConfig, model: dict) -> None:
        self._run_dir, self._rollout, self._model = run_dir, rollout, model
        self._events = EventLog(Path(run_dir))
        self._queue: deque[_Unit] = deque()
        self._batches: dict[str, _Batch] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._started = 0
        self._engines = [self._start("start") for _ in range(rollout.engines)]
        threading.Thread(target=self._run_for_ever, daemon=True).start()

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
        """See RolloutSource."""
        with self._changed:
            wanted = self._batches[batch]
            self._changed.wait_for(lambda: self._failure or len(wanted.done) == wanted.num_units)
            if self._failure:
                raise RuntimeError(self._failure)
            del self._batches[batch]
        return [sample for index in sorted(wanted.done) for sample in wanted.done[index]]

    def audit(self, version: int) -> dict[str, str]:
        """See RolloutSource. An engine that dies meanwhile is replaced and asked again."""
        hashes: dict[str, str] = {}
        for place, engine in enumerate(self._engines):
            while engine.name not in hashes:
                engine = self._engines[place]
                try:
                    hashes[engine.name] = ray.get(engine.actor.audit.remote(version))
                except ray.exceptions.RayActorError as error:
                    self._replace(engine, error)
        return hashes

    def _start(self, what: str) -> _Engine:
        name = f"engine-{self._started}"
        self._started += 1
        actor = EngineActor.options(num_cpus=self._rollout.num_cpus, max_concurrency=2).remote(
            name, self._run_dir, self._rollout, self._model
        )
        self._events.write("engine", {"engine": name, "what": what, "version": None})
        return _Engine(name, actor)

    def _replace(self, engine: _Engine, error: ray.exceptions.RayActorError) -> None:
        with self._changed:
            if engine not in self._engines:
                return
            reason = str(error).strip().splitlines()[-1]
            dead = {"engine": engine.name, "what": "dead", "version": None, "reason": reason}
            self._events.write("engine", dead)
            if engine.unit is not None:
                self._queue.appendleft(engine.unit)
            if self._started - self._rollout.engines >= self._rollout.max_replacements:
                self._failure = (
                    f"{self._started} rollout engines were started and died; gave up after"
                    f" rollout.max_replacements={self._rollout.max_replacements}: {reason}"
                )
                self._changed.notify_all()
                return
            self._engines[self._engines.index(engine)] = self._start("replaced")

    def _run_for_ever(self) -> None:
        while self._failure is None:
            self._hand_out()
            running = {e.running: e for e in self._engines if e.running is not None}
            if not running:
                with self._changed:
                    self._changed.wait(timeout=0.2)
                continue
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0.2)
            for reference in ready:
                self._take(running[reference])

    def _hand_out(self) -> None:
        with self._changed:
            for engine in self._engines:
                if engine.running is None and self._queue:
                    engine.unit = unit = self._queue.popleft()
                    engine.running = engine.actor.run.remote(unit.requests, unit.oldest_version)

    def _take(self, engine: _Engine) -> None:
        try:
            samples = ray.get(engine.running)
        except ray.exceptions.RayActorError as error:
            self._replace(engine, error)
            return
        except ray.exceptions.RayTaskError as error:
            with self._changed:
                self._failure = f"{engine.name} failed: {error.cause}"
                self._changed.notify_all()
            return
        with self._changed:
            unit, engine.unit, engine.running = engine.unit, None, None
            self._batches[unit.batch].done[unit.index] = samples
            self._changed.notify_all()
