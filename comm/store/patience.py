"""How long a store that does not answer is asked again.

The one idea: patience is counted from the first failure since the last real progress, so a slow
link may take its time and a dead one may not. A body that was cut goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from gossamer.comm.store import StoreError

T = TypeVar("T")
LOG = logging.getLogger(__name__)

PATIENCE_VARIABLE = "GOSSAMER_STORE_PATIENCE_S"
DEFAULT_PATIENCE_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0

# less than this is no progress: a link that drips must not be waited for without end
PROGRESS_BYTES = 65536


class Unanswered(Exception):  # noqa: N818, it never leaves comm/store
    """One attempt that failed and may succeed when it is made again."""

    def __init__(self, reason: str, from_start: bool = False) -> None:
        super().__init__(reason)
        self.from_start = from_start
        """The rest of a body need not belong to what was read of it."""


def patience_s() -> float:
    """Seconds to go on asking, from GOSSAMER_STORE_PATIENCE_S. Raises ValueError."""
    text = os.environ.get(PATIENCE_VARIABLE, str(DEFAULT_PATIENCE_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{PATIENCE_VARIABLE} must be a number of seconds from 0, not {text!r}")
    return seconds


class Patience:
    """Pauses between attempts at one thing, until `seconds` went by without progress."""

    def __init__(self, what: str, seconds: float) -> None:
        self._what = what
        self._seconds = seconds
        self._failing_since_s: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def progressed(self) -> None:
        """Starts counting anew."""
        self._failing_since_s, self._pause_s = None, FIRST_PAUSE_S

    def pause(self, error: Unanswered) -> None:
        """Waits a little longer each time. Raises StoreError when patience is at its end."""
        now_s = time.monotonic()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
            LOG.warning("%s: %s; asking again for %g s", self._what, error, self._seconds)
        left_s = self._failing_since_s + self._seconds - now_s
        if left_s <= 0:
            raise StoreError(
                f"{self._what} failed for {self._seconds:g} s ({PATIENCE_VARIABLE}): {error}"
            ) from error
        # readers that failed together must not come back together
        time.sleep(min(left_s, self._pause_s * random.uniform(0.5, 1.0)))
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def ask(what: str, seconds: float, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, made again when it raises Unanswered. Raises StoreError."""
    patience = Patience(what, seconds)
    while True:
        try:
            return attempt()
        except Unanswered as error:
            patience.pause(error)


def read_on(what: str, seconds: float, body_from: Callable[[int], Iterator[bytes]]) -> bytes:
    """A whole body; `body_from(n)` yields it from byte n on and ends only at its end.

    Raises StoreError.
    """
    patience = Patience(what, seconds)
    got, mark = bytearray(), 0
    while True:
        try:
            mark_s = time.monotonic()
            for piece in body_from(len(got)):
                got += piece
                if len(got) - mark >= PROGRESS_BYTES:
                    patience.progressed()
                    mark, mark_s = len(got), time.monotonic()
                elif time.monotonic() - mark_s > max(seconds, 1.0):
                    raise Unanswered(f"fewer than {PROGRESS_BYTES} bytes came")
            return bytes(got)
        except Unanswered as error:
            if error.from_start:
                got.clear()  # but not `mark`: to read the same again is no progress
            patience.pause(error)
