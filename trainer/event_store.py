"""A run's events in a store, where nothing can be appended to a file.

The one idea: each process writes segments of its own. It puts the newest one again, about once a
second, with the lines that came; a segment that is full is left, and the next begun. Whoever has
so many bytes of a writer knows where more would be, and asks for those alone.

    metrics/<writer>.json               who writes there; put first
    metrics/<writer>/00000000.jsonl     whole lines; full from SEGMENT_BYTES on

A put is whole or not at all, so a kill loses what came since the last one and no more.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from gossamer.comm.store import open_store

LOG = logging.getLogger(__name__)

FOLDER = "metrics/"
SEGMENT_BYTES = 8192
"""Small: what is put again with each new line. Large: files that a late reader fetches."""
EVERY_S = 1.0
IDLE_S, IDLE_LOOK_S = 60.0, 15.0
"""A writer that is silent for so long is looked at only so often."""
READERS = 8


def segment_name(writer: str, number: int) -> str:
    """The file of one segment."""
    return f"{FOLDER}{writer}/{number:08d}.jsonl"


class StoreLines:
    """Lines of one process, put by a thread; what fails is put again with the lines that follow."""

    def __init__(self, url: str) -> None:
        """Raises StoreError where the store takes no files."""
        self._store = open_store(url)
        self._writer = f"{int(time.time() * 1000):013d}-{secrets.token_hex(4)}"
        told = {"host": socket.gethostname(), "pid": os.getpid(), "began_s": time.time()}
        self._store.put(f"{FOLDER}{self._writer}.json", json.dumps(told).encode())
        self._number, self._text = 0, b""
        self._waiting: list[bytes] = []
        self._adding, self._putting = threading.Lock(), threading.Lock()
        self._has_more = threading.Event()
        threading.Thread(target=self._put_for_ever, daemon=True).start()
        atexit.register(self._put_last)

    def add(self, line: bytes) -> None:
        """Takes a whole line; it is in the store about a second later."""
        with self._adding:
            self._waiting.append(line)
        self._has_more.set()

    def flush(self) -> None:
        """Returns once every line is in the store. Raises StoreError."""
        with self._putting:
            with self._adding:
                count = len(self._waiting)
                text = self._text + b"".join(self._waiting)
            if not count:
                return
            self._store.put(segment_name(self._writer, self._number), text, overwrite=True)
            with self._adding:
                del self._waiting[:count]
            self._text = text
            if len(text) >= SEGMENT_BYTES:
                self._number, self._text = self._number + 1, b""

    def _put_for_ever(self) -> None:
        while True:
            self._has_more.wait()
            self._has_more.clear()
            try:
                self.flush()
            except OSError as error:
                LOG.warning("events wait for the store: %s", error)
                self._has_more.set()
            time.sleep(EVERY_S)

    def _put_last(self) -> None:
        try:
            self.flush()
        except OSError as error:
            LOG.warning("events were lost: %s", error)


@dataclass(slots=True)
class _Seen:
    """What a reader has of a writer."""

    number: int = 0
    nbytes: int = 0
    """Of that segment."""
    last_s: float = 0.0
    """Time of its last line; never goes back."""
    progress_s: float = 0.0
    look_s: float = 0.0
    """On the monotonic clock: when something came, and when it was asked for."""
    found: list[tuple[float, bytes]] = field(default_factory=list)


class StoreTail:
    """Reads the lines of all writers, each line once."""

    def __init__(self, url: str) -> None:
        self.url, self._store = url, open_store(url)
        self._seen: dict[str, _Seen] = {}

    def read(self, is_last: bool = False) -> list[bytes]:
        """What came since the last call, by time; each writer's lines in its own order.

        `is_last`: silent writers are looked at, too. Raises StoreError; the next call returns what
        this one found before.
        """
        now_s = time.monotonic()
        for name in self._store.list(FOLDER):
            writer = name.removeprefix(FOLDER).removesuffix(".json")
            self._seen.setdefault(writer, _Seen(progress_s=now_s))
        due = [
            writer
            for writer, seen in self._seen.items()
            if is_last or now_s - seen.progress_s < IDLE_S or now_s - seen.look_s >= IDLE_LOOK_S
        ]
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(self._read_one, due):
                pass  # raises what one raised
        found: list[tuple[float, bytes]] = []
        for seen in self._seen.values():
            found += seen.found
            seen.found = []
        return [line for _, line in sorted(found, key=lambda pair: pair[0])]

    @property
    def has_writers(self) -> bool:
        """Whether the last look found any."""
        return bool(self._seen)

    def _read_one(self, writer: str) -> None:
        seen = self._seen[writer]
        seen.look_s = time.monotonic()
        while True:
            try:
                data = self._store.get(segment_name(writer, seen.number), seen.nbytes)
            except FileNotFoundError:
                data = b""
            for line in data.splitlines(keepends=True):
                seen.last_s = max(seen.last_s, _time_of(line))
                seen.found.append((seen.last_s, line))
            if data:
                seen.nbytes, seen.progress_s = seen.nbytes + len(data), time.monotonic()
            if seen.nbytes < SEGMENT_BYTES:
                return
            seen.number, seen.nbytes = seen.number + 1, 0


class LiveTail:
    """A StoreTail for displays: asked often, it looks in a thread, and no outage stops who asks."""

    def __init__(self, url: str) -> None:
        self._tail, self._lines = StoreTail(url), list[bytes]()
        self._look: threading.Thread | None = None
        self._look_s = -EVERY_S

    def read(self) -> list[bytes]:
        """What was found since the last call; the first call waits for all that is there."""
        is_first = self._look is None
        lines = self._taken()
        if not self._is_looking() and time.monotonic() - self._look_s >= EVERY_S:
            self._look_s = time.monotonic()
            self._look = threading.Thread(target=self._take, daemon=True)
            self._look.start()
            if is_first:
                self._look.join()
        return lines + self._taken()

    def read_to_end(self) -> list[bytes]:
        """The same, with all that is in the store by now."""
        if self._look is not None:
            self._look.join()
        self._take(is_last=True)
        return self._taken()

    def _is_looking(self) -> bool:
        return self._look is not None and self._look.is_alive()

    def _taken(self) -> list[bytes]:
        if self._is_looking():
            return []
        lines, self._lines = self._lines, []
        return lines

    def _take(self, is_last: bool = False) -> None:
        try:
            self._lines += self._tail.read(is_last)
        except OSError as error:
            LOG.warning("events cannot be read now: %s", error)


def _time_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["time_s"])
    except (ValueError, KeyError, TypeError):
        return 0.0
