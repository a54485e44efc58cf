"""A place of a pool: its engine gets units, and another one is put in its place when it has to be.

The one idea: one thread lives one engine after the other, from the wait for room to its end, and
launch/lifecycle.py says what comes of what it sees. Whatever happens to an engine costs time alone:
its unit is run again, and a new engine catches up with the log before it is given anything.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError
from gossamer.launch.config import PoolConfig, RecoveryConfig, RolloutConfig
from gossamer.launch.engine_actor import UnfitError
from gossamer.launch.engine_room import TICK_S, ActorEngine, ActorRoom, LostError, UnbuiltError
from gossamer.launch.lifecycle import Event, Failure, State, after, decide
from gossamer.launch.rollout_queue import RolloutQueue, Unit
from gossamer.launch.server_room import ServerEngine, ServerRoom, server_name
from gossamer.trainer.metrics import EventLog

LAG_S = 10.0
"""A server to which no unit may be given for so long says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolRun:
    """What the places of a run share."""

    rollout: RolloutConfig
    recovery: RecoveryConfig
    queue: RolloutQueue
    events: EventLog
    log: WeightLog
    named: Counter[str] = field(default_factory=Counter)
    """Engines that were started, by pool."""
    proven: set[str] = field(default_factory=set)
    """Pools that have had an engine."""
    on_lost: Callable[[str], None]
    """Called with the reason when a place was given up."""


class PoolPlace:
    """One place, and the thread that looks after it. `run.queue.changed` guards what changes."""

    def __init__(
        self,
        number: int,
        pool: PoolConfig,
        url: str | None,
        room: ActorRoom | ServerRoom,
        run: PoolRun,
        is_wished: bool,
    ) -> None:
        """url: of a server. is_wished: it is not the recipe's, so it may be lost but ends no run.
        Begins at once."""
        self.number, self.pool, self.url, self._is_wished = number, pool, url, is_wished
        self.state = State.WAITING
        self.name = ""
        """Of its engine, or of the next one."""
        self.engine: ActorEngine | ServerEngine | None = None
        self.waits_for = ""
        """What was told that it waits for, as long as it does."""
        self.fault: LostError | UnfitError | None = None
        """What others found about its engine, which ends with it."""
        self._room, self._run, self._queue = room, run, run.queue
        self._changed = run.queue.changed
        self._is_anew, self._begins = False, "start"
        self._answered = 0
        self._failures: list[Failure] = []
        self.thread = threading.Thread(target=self._tend, daemon=True)
        self.thread.start()

    def enter(self, event: Event) -> None:
        """Something happened. Who leaves, or is over, hears of nothing but its end."""
        with self._changed:
            is_heard = self.state is not State.LEAVING or event in (Event.IDLE, Event.DIED)
            if is_heard and not self.state.is_over:
                self.state = after(self.state, event)
            self._changed.notify_all()

    def clear(self) -> None:
        """Nobody need know any more that it was given up."""
        if self.state is State.LOST:
            self._tell("left")

    # --- an engine's life -----------------------------------------------------------------------

    def _tend(self) -> None:
        """What the thread runs; whatever ends it reaches those who wait."""
        try:
            while not self.state.is_over and self._queue.failure is None:
                self._live()
        except BaseException as error:
            self._queue.fail(f"{self.name} failed: {error}")
        self._room.close()
        if self.state is State.STOPPED:
            self._tell("left")

    def _live(self) -> None:
        """One engine, from the wait for room to its end."""
        self.name = self._next_name()
        fault: UnfitError | LostError | None = None
        try:
            if self._has_room() and self._is_up():
                self._serve()
        except (UnfitError, LostError) as error:
            fault = error
        except Exception as error:
            if self.state is State.WAITING:
                raise  # no engine's
            fault = LostError(f"{type(error).__name__}: {error}")
        finally:
            with self._changed:
                engine, self.engine, self.fault = self.engine, None, None
                self._changed.notify_all()
            if engine is not None:
                engine.stop()
        is_unfit = isinstance(fault, UnfitError) and self._is_drained(str(fault))
        if fault is not None and not is_unfit:
            self._bury(fault)
        elif self.state is State.LEAVING:
            self.enter(Event.IDLE)
        elif self.state is State.DRAINING:
            self._renew()

    def _has_room(self) -> bool:
        """Waits until an engine can be started; False where none is wanted any more."""
        while not self._room.is_ready():
            if self.state not in (State.WAITING, State.STARTING) or self._queue.failure:
                return False
            self._tell_wait(self._room.waits_for)
        self._tell_wait("")
        if self.state is State.WAITING:
            self.enter(Event.START)
        return self.state is State.STARTING

    def _is_up(self) -> bool:
        """Starts an engine and waits until it has caught up; False where it is to leave."""
        engine = self.engine = self._room.start(self.name, self._is_anew)
        self._tell(self._begins)
        begun_s, most_s = time.monotonic(), self._run.rollout.start_timeout_s
        while not engine.is_ready():
            if self.state is not State.STARTING or self._queue.failure:
                return False
            # its node may have died, which Ray finds out later than that the engine did
            has_room = self._room.is_ready()
            waits_for = engine.waits_for if has_room else self._room.waits_for
            self._tell_wait(waits_for)
            if waits_for:
                begun_s = time.monotonic()
            elif time.monotonic() - begun_s > most_s:
                raise LostError(f"{self.name} was not up in rollout.start_timeout_s={most_s:g}")
        self._tell_wait("")
        self._is_anew = False
        self._run.proven.add(self.pool.name)
        self.enter(Event.READY)
        self._tell("ready", version=engine.version)
        return True

    def _serve(self) -> None:
        """Gives units to the engine while it is fit and wanted."""
        engine, looked_s, held_s = self.engine, 0.0, None
        assert engine is not None  # _is_up made one
        gave_s = time.monotonic()
        while self.state is State.RUNNING and not self._queue.failure:
            patience_s = engine.poll_s if len(self._queue) else TICK_S
            if time.monotonic() - looked_s >= patience_s:
                looked_s = time.monotonic()
                self._look(None)
                continue
            with self._changed:
                unit = self._queue.next(lambda unit: engine.can_run(unit.oldest_version))
                if unit is None:
                    if is_held := self._queue.is_held():
                        held_s = held_s or time.perf_counter()
                    least = self._queue.least_version()
                    if is_held or least is None or engine.can_run(least):
                        gave_s = time.monotonic()
                    elif time.monotonic() - gave_s > LAG_S:
                        versions = f"from version {engine.version} to {least}"
                        self._tell_wait(f"{self.url} to get {versions}")
                    self._changed.wait(patience_s)
                    continue
            if held_s is not None:
                self._tell("held", held_s=time.perf_counter() - held_s)
                held_s = None
            self._tell_wait("")
            self._run_unit(engine, unit)
            gave_s = time.monotonic()

    def _run_unit(self, engine: ActorEngine | ServerEngine, unit: Unit) -> None:
        oldest = unit.oldest_version
        try:
            samples = engine.run(unit.requests, oldest, lambda: self._look(unit))
            if not unit.is_met_by(samples):
                raise UnfitError(f"it sampled with weights older than version {oldest}")
        except UnfitError:
            self._queue.put_back(unit)
            raise
        except Exception as error:
            is_lost = isinstance(error, LostError)
            if not is_lost and not self._run.rollout.prompt_retries:
                return self._queue.fail(f"{self.name} failed: {error}")
            if (request := self._queue.try_again(unit)) is not None:
                reason = "the engine died" if is_lost else str(error)
                self._tell("prompt_lost", request=request, reason=reason)
            if is_lost:
                raise
        else:
            self._queue.take(unit, samples)
            self._answered += 1

    def _look(self, unit: Unit | None) -> None:
        """Is the engine fit? One that is too far behind finishes its unit, unless it waits with it
        for a version. Raises LostError, UnfitError."""
        engine, most = self.engine, self._run.rollout.max_behind
        assert engine is not None  # it serves
        if self.fault is not None:
            raise self.fault
        engine.look(-1 if most is None else self._head())
        if most is None or engine.behind <= most:
            return
        reason = f"{engine.behind} versions behind, rollout.max_behind is {most}"
        self._is_drained(reason)
        if unit is not None and (engine.version is None or engine.version < unit.oldest_version):
            raise UnfitError(reason)

    def _head(self) -> int:
        """Of the log; -1 where it is empty, or cannot be read: then nobody counts as behind."""
        try:
            head = self._run.log.head()
        except (LogError, OSError):
            return -1
        return -1 if head is None else head

    # --- what happens to it ---------------------------------------------------------------------

    def _is_drained(self, reason: str) -> bool:
        """An unfit engine gets no more units; False for one that never got any."""
        with self._changed:
            if self.state is State.RUNNING:
                self.enter(Event.UNFIT)
                self._failures.append(Failure(f"{self.name} was unfit: {reason}", self._answered))
                self._is_anew = True
                self._tell("drained", reason=reason)
            return self.state in (State.DRAINING, State.LEAVING)

    def _renew(self) -> None:
        """A new engine in place of one that was unfit, unless that happens all the time."""
        self._begins = "reseeded"
        pause_s = decide(self._failures, self._run.recovery).restart_after_s
        if pause_s is None:
            self.enter(Event.DIED)
            return self._give_up()
        self._pause(State.DRAINING, pause_s)
        self.enter(Event.IDLE)

    def _bury(self, error: LostError | UnfitError) -> None:
        """An engine died: another one in its place, after a while, or none any more."""
        is_unbuilt = isinstance(error, UnbuiltError)
        what = f"{self.name} {'could not be built' if is_unbuilt else 'died'}: {error}"
        is_final = is_unbuilt and self.pool.name not in self._run.proven
        self._failures.append(Failure(what, self._answered, is_final))
        self._begins = "replaced"
        self.enter(Event.DIED)
        self._tell("dead", reason=str(error))
        if self.state is not State.WAITING:
            return
        pause_s = decide(self._failures, self._run.recovery).restart_after_s
        if pause_s is None:
            return self._give_up()
        self._pause(State.WAITING, pause_s)

    def _pause(self, state: State, pause_s: float) -> None:
        """As long as it is in that state."""
        with self._changed:
            self._changed.wait_for(lambda: self.state is not state or self._queue.failure, pause_s)

    def _give_up(self) -> None:
        why = decide(self._failures, self._run.recovery).why
        self.enter(Event.GIVEN_UP)
        self._tell("lost", reason=why)
        if self._failures[-1].is_final and not self._is_wished:
            self._queue.fail(why)
        self._run.on_lost(why)

    # --- what is told of it ---------------------------------------------------------------------

    def _next_name(self) -> str:
        if self.url is not None:
            return server_name(self.url)
        with self._changed:
            number = self._run.named[self.pool.name]
            self._run.named[self.pool.name] += 1
        return f"{self.pool.name}-{number}"

    def _tell_wait(self, waits_for: str) -> None:
        """Once for each thing that is waited for; "" for none."""
        is_new, self.waits_for = waits_for != self.waits_for, waits_for
        if is_new and waits_for:
            self._tell("waits", waits_for=waits_for)

    def _tell(self, what: str, **fields: Any) -> None:  # noqa: ANN401
        told = {"engine": self.name, "what": what, "version": None}
        place = {"pool": self.pool.name, "place": self.number, "state": str(self.state)}
        with suppress(OSError):  # a full disk, and no sample depends on what is told
            self._run.events.write("engine", {**told, **place, **fields})
