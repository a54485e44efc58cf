"""A progress bar for what takes longer than a second; lines of text where stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_S = 1.0
LINE_EVERY_S = 10.0


class Meter:
    """Called with (done, total) as work goes on; a context manager."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started_s = self._said_s = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._started_s < QUIET_S:
            return
        if not sys.stderr.isatty():
            if now_s - self._said_s >= LINE_EVERY_S:
                print(f"{self._what}: {done} of {total}", file=sys.stderr, flush=True)
                self._said_s = now_s
            return
        if self._bar is None:
            columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._what)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)
