"""What the trainer asked engines for: units in a queue, and the samples of each batch.

The one idea: a unit (a fixed list of requests) is run whole by one engine, and running it again
gives the same samples, so whatever happens to an engine costs nothing but time: its unit goes back
to the front. A prompt that no engine survives is found by running each prompt of its unit alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

from gossamer.comm.rollout import Request, Sample


@dataclass(slots=True, eq=False)
class Batch:
    """What the trainer collects at once."""

    order: list[str]
    """Of its requests."""
    waited_for: int
    """Requests that are neither sampled nor given up."""
    is_wanted: bool = False
    """The trainer waits for it."""
    is_forgotten: bool = False
    """It was asked for by an attempt that is over."""
    samples: dict[str, Sample] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What one engine runs."""

    batch: Batch
    requests: list[Request]
    oldest_version: int
    failures: int = 0

    def is_met_by(self, samples: list[Sample]) -> bool:
        """Whether no token is of weights that are older than was asked for."""
        spans = (span for sample in samples for span in sample.spans)
        return all(span.version >= self.oldest_version for span in spans)


class RolloutQueue:
    """Safe in several threads; whatever changes notifies `changed`."""

    def __init__(self, max_waiting_samples: int | None, prompt_retries: int) -> None:
        self.changed = threading.Condition()
        self.failure: str | None = None
        """Why nothing will be answered any more."""
        self._most, self._retries = max_waiting_samples, prompt_retries
        self._units: deque[Unit] = deque()
        self._batches: dict[str, Batch] = {}
        self._attempt = 0

    def begin_attempt(self, number: int) -> None:
        """Forgets what earlier attempts asked for, and refuses what they still ask: what they did
        not save is asked anew."""
        with self.changed:
            self._attempt = number
            for batch in self._batches.values():
                batch.is_forgotten = True
            self._units.clear()
            self._batches.clear()
            self.changed.notify_all()

    def check_attempt(self, number: int) -> None:
        """Raises RuntimeError for one that is over: its calls may arrive late."""
        if number < self._attempt:
            raise RuntimeError(f"attempt {number} is over; attempt {self._attempt} goes on")

    def submit(
        self, name: str, units: list[list[Request]], oldest_version: int, attempt: int = 0
    ) -> None:
        """See RolloutSource. Raises RuntimeError for an attempt that is over."""
        with self.changed:
            self.check_attempt(attempt)
            order = [request.request_id for requests in units for request in requests]
            batch = self._batches[name] = Batch(order=order, waited_for=len(order))
            self._units.extend(Unit(batch, requests, oldest_version) for requests in units)
            self.changed.notify_all()

    def collect(self, name: str, attempt: int = 0) -> list[Sample]:
        """See RolloutSource. Raises RuntimeError after `fail`, or once the attempt is over."""
        with self.changed:
            self.check_attempt(attempt)
            batch = self._batches[name]
            batch.is_wanted = True
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: self.failure or batch.is_forgotten or not batch.waited_for
            )
            self.raise_failure()
            if batch.is_forgotten:
                raise RuntimeError(f"batch {name} was asked for by an attempt that is over")
            del self._batches[name]
            self.changed.notify_all()
        return [batch.samples[name] for name in batch.order if name in batch.samples]

    def next(self, fits: Callable[[Unit], bool] = lambda unit: True) -> Unit | None:
        """Takes the next unit that `fits`: of what the trainer waits for, else the oldest, unless
        enough is ready. None: there is none now."""
        with self.changed:
            fitting = [unit for unit in self._units if fits(unit)]
            wanted = (unit for unit in fitting if unit.batch.is_wanted)
            unit = next(wanted, None)
            if unit is None and fitting and self._has_room():
                unit = fitting[0]
            if unit is not None:
                self._units.remove(unit)
            return unit

    def is_held(self) -> bool:
        """Whether units wait for the trainer to ask for what is ready."""
        with self.changed:
            is_any_wanted = any(unit.batch.is_wanted for unit in self._units)
            return bool(self._units) and not is_any_wanted and not self._has_room()

    def least_version(self) -> int | None:
        """The oldest that a unit may be sampled at, of those that the trainer waits for, if any;
        None where there is no unit."""
        with self.changed:
            units = [unit for unit in self._units if unit.batch.is_wanted] or self._units
            return min((unit.oldest_version for unit in units), default=None)

    def __len__(self) -> int:
        return len(self._units)

    def take(self, unit: Unit, samples: list[Sample]) -> None:
        """Answers a unit; with fewer samples than requests, the others are given up."""
        with self.changed:
            unit.batch.samples |= {sample.request_id: sample for sample in samples}
            unit.batch.waited_for -= len(unit.requests)
            self.changed.notify_all()

    def put_back(self, unit: Unit) -> None:
        """To the front: the engine that had it is to blame."""
        self._put_back([unit])

    def try_again(self, unit: Unit) -> str | None:
        """Puts a unit that failed back: as it is, or each of its prompts alone.

        Returns the first request of a prompt that failed so often that it is given up.
        """
        if not self._retries:
            self._put_back([unit])
            return None
        prompts = [list(each) for _, each in groupby(unit.requests, lambda r: r.prompt_ids)]
        if unit.failures >= self._retries and len(prompts) == 1:
            self.take(unit, [])
            return unit.requests[0].request_id
        failures = unit.failures + 1
        self._put_back([Unit(unit.batch, each, unit.oldest_version, failures) for each in prompts])
        return None

    def fail(self, reason: str) -> None:
        """Nothing will be answered any more."""
        with self.changed:
            self.failure = self.failure or reason
            self.changed.notify_all()

    def raise_failure(self) -> None:
        """Raises RuntimeError after `fail`."""
        if self.failure is not None:
            raise RuntimeError(self.failure)

    def _put_back(self, units: list[Unit]) -> None:
        with self.changed:
            self._units.extendleft(unit for unit in reversed(units) if not unit.batch.is_forgotten)
            self.changed.notify_all()

    def _has_room(self) -> bool:
        unasked = sum(len(b.samples) for b in self._batches.values() if not b.is_wanted)
        return self._most is None or unasked < self._most
