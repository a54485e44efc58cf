"""The rollout pools: what the trainer asks of them, what is wanted of them, and their places.

The one idea: what was asked for (rollout_queue.py), what is wanted (pool_wishes.py) and what comes
of what happens to an engine (lifecycle.py) need no Ray; a place (pool_place.py) looks after itself.
What running again would not mend (an engine that cannot be built, or that refuses a unit, unless
prompts may be given up) ends the run, and so does the loss of the last place.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gossamer.comm.log import WeightLog
from gossamer.comm.rollout import Request, Sample
from gossamer.launch.config import RecoveryConfig, RolloutConfig
from gossamer.launch.engine_actor import UnfitError
from gossamer.launch.engine_room import TICK_S, ActorEngine, ActorRoom, LostError
from gossamer.launch.lifecycle import Event, State
from gossamer.launch.pool_place import PoolPlace, PoolRun
from gossamer.launch.pool_wishes import Add, Held, Leave, read_wishes, reconcile, wishes
from gossamer.launch.rollout_queue import RolloutQueue
from gossamer.launch.server_room import ServerEngine, ServerRoom
from gossamer.trainer.metrics import EventLog
from gossamer.trainer.run_folder import LOG_FOLDER, inside, open_run


class RolloutPool:
    """RolloutSource for the trainer."""

    def __init__(
        self, run_dir: str, rollout: RolloutConfig, recovery: RecoveryConfig, model: dict
    ) -> None:
        if (key := rollout.public_key_path) is not None and not Path(key).is_file():
            raise ValueError(f"rollout.public_key_path: {key} is missing on the driver's host")
        self._run_dir, self._where, self._model = open_run(run_dir), run_dir, model
        self._queue = RolloutQueue(rollout.max_waiting_samples, rollout.prompt_retries)
        self._changed = self._queue.changed
        self._run = PoolRun(
            rollout=rollout,
            recovery=recovery,
            queue=self._queue,
            events=EventLog(self._run_dir),
            log=WeightLog.open(inside(self._run_dir, LOG_FOLDER), public_key=key),
            on_lost=self._go_on_without,
        )
        self._pools = {pool.name: pool for pool in rollout.all_pools}
        self._places: list[PoolPlace] = []
        self._num_placed = 0
        self._asked: bytes | None = b""
        """The file of wishes that was heeded last."""
        self._tell("pools", pools=list(self._pools))
        self._is_open = False

    def open(self) -> None:
        """Makes the places that are wanted, and heeds new wishes from then on."""
        if self._is_open:
            return
        self._is_open = True
        try:
            self._heed()
        except (ValueError, OSError) as error:
            return self._queue.fail(str(error))
        threading.Thread(target=self._heed_for_ever, daemon=True).start()

    # --- what the trainer asks ------------------------------------------------------------------

    def begin_attempt(self, number: int) -> None:
        """Forgets what earlier attempts asked for; whatever they still ask is refused."""
        self._queue.begin_attempt(number)

    def submit(
        self, batch: str, units: list[list[Request]], oldest_version: int, attempt: int = 0
    ) -> None:
        """See RolloutSource."""
        self._queue.submit(batch, units, oldest_version, attempt)

    def collect(self, batch: str, attempt: int = 0) -> list[Sample]:
        """See RolloutSource. Raises RuntimeError once the pool has given up."""
        return self._queue.collect(batch, attempt)

    def audit(self, version: int, attempt: int = 0) -> dict[str, str]:
        """See RolloutSource. An engine that dies meanwhile, or cannot say, is replaced and asked
        again; those that wait for a place, or for their server, and servers that may not be asked,
        are left out."""
        hashes: dict[str, str | None] = {}
        while (engines := self._unaudited(hashes, attempt)) is not None:
            for engine in engines:
                try:
                    hashes[engine.name] = engine.audit(version)
                except (LostError, UnfitError) as error:
                    self._retire(engine, error)
        for name in (name for name, found in hashes.items() if found is None):
            self._tell("engine", engine=name, what="unaudited", version=None)
        return {name: found for name, found in hashes.items() if found is not None}

    def watch(self) -> None:
        """Waits until the pool has given up, and raises RuntimeError that says why."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue.failure)
            self._queue.raise_failure()

    def _unaudited(
        self, known: dict[str, str | None], attempt: int
    ) -> list[ActorEngine | ServerEngine] | None:
        """Engines to ask, waiting for those that will soon be there; None when all were asked."""
        with self._changed:
            while True:
                self._queue.raise_failure()
                self._queue.check_attempt(attempt)
                places = [place for place in self._places if not place.state.is_over]
                there = [p.engine for p in places if p.engine and p.state is State.RUNNING]
                if left := [engine for engine in there if engine.name not in known]:
                    return left
                if known and all(p.state is State.RUNNING or p.waits_for for p in places):
                    return None
                self._changed.wait(TICK_S)

    def _retire(self, engine: ActorEngine | ServerEngine, error: LostError | UnfitError) -> None:
        """Its place learns why no hash of it is to be had, and puts another one there."""
        with self._changed:
            for place in self._places:
                if place.engine is engine:
                    place.fault = error
            self._changed.wait_for(
                lambda: self._queue.failure or all(p.engine is not engine for p in self._places)
            )

    # --- what is wanted -------------------------------------------------------------------------

    def _heed_for_ever(self) -> None:
        told = ""
        while self._queue.failure is None:
            time.sleep(TICK_S)
            try:
                self._heed()
            except (ValueError, OSError) as error:
                if (why := f"not heeded: {error}") != told:
                    self._tell("lifecycle", part="pools", state="running", why=why)
                told = why

    def _heed(self) -> None:
        """Makes and leaves places where the wish is new. Raises ValueError, OSError."""
        asked = read_wishes(self._run_dir)
        if asked == self._asked:
            return
        self._asked = asked
        wanted = wishes(asked, self._pools.values())
        with self._changed:
            for place in self._places:
                place.clear()
            self._places = [place for place in self._places if not place.state.is_over]
            held = [
                Held(number=place.number, pool=place.pool.name, url=place.url)
                for place in self._places
                if place.state is not State.LEAVING
            ]
            for action in reconcile(wanted, held):
                self._act(action)

    def _act(self, action: Add | Leave) -> None:
        if isinstance(action, Leave):
            (place,) = (each for each in self._places if each.number == action.number)
            return place.enter(Event.LEAVE)
        pool, run = self._pools[action.pool], self._run
        room: ActorRoom | ServerRoom
        if action.url is None:
            room = ActorRoom(pool, self._where, run.rollout, self._model)
        else:
            room = ServerRoom(action.url, self._model["eos_token_id"], run.log, run.events)
        is_wished = self._asked is not None
        place = PoolPlace(self._num_placed, pool, action.url, room, run, is_wished)
        self._places.append(place)
        self._num_placed += 1

    def _go_on_without(self, why: str) -> None:
        """A place was given up."""
        with self._changed:
            if all(place.state.is_over for place in self._places):
                return self._queue.fail(f"no engine is left: {why}")
        self._tell("lifecycle", part="pools", state="running", why=f"a place was given up: {why}")

    def _tell(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        with suppress(OSError):  # a full disk, and no sample depends on what is told
            self._run.events.write(event, fields)
