"""A vLLM server that runs anyway, as an engine of a pool.

The one idea: it is asked over HTTP by the pool itself and follows the log by itself, so it reserves
nothing here and is never waited for with a unit in hand: it gets those that its version entitles
it to. Its labels name the log's run, so weights of another one are never taken for this one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from gossamer.comm.engines.follow import EngineError
from gossamer.comm.engines.vllm_server import VLLMServer
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError
from gossamer.comm.rollout import Request, Sample
from gossamer.launch.engine_room import TICK_S, LostError, UnbuiltError
from gossamer.trainer.metrics import EventLog

AUDIT_PATIENCE_S = 60.0
"""For a server to get to the version that is audited."""


def server_name(url: str) -> str:
    """What its engine is called."""
    parts = urlsplit(url)
    return parts.netloc + parts.path


class ServerRoom:
    """A server needs no room: it is there or it is not."""

    waits_for = ""

    def __init__(self, url: str, eos_id: int, log: WeightLog, events: EventLog) -> None:
        self._url, self._eos_id, self._log, self._events = url, eos_id, log, events

    def is_ready(self) -> bool:
        return True

    def start(self, name: str, is_anew: bool) -> ServerEngine:
        """Raises UnbuiltError for a URL, or a token, that cannot be used; LostError without log."""
        try:
            server = VLLMServer(self._url, eos_id=self._eos_id, run_id=self._log.run_id)
            return ServerEngine(name, server, self._log, self._events)
        except ValueError as error:
            raise UnbuiltError(str(error)) from None
        except (LogError, OSError) as error:
            raise LostError(str(error)) from None

    def close(self) -> None:
        """Leaves the server alone."""


class ServerEngine:
    """Raises LostError for what is the server's fault, RequestError for what is a request's."""

    poll_s = 0.05
    """Where units wait for a version that it may have by now."""

    def __init__(self, name: str, server: VLLMServer, log: WeightLog, events: EventLog) -> None:
        self.name, self._server, self._log, self._events = name, server, log, events
        self.version: int | None = None
        self.behind = 0
        self._goal = self._newest = log.head()
        self.waits_for = f"an answer of {server.url}"

    def is_ready(self) -> bool:
        """Whether it answers, and serves what was the head of this log, or later.

        What is lacking is told in `waits_for`; a server that is away is waited for.
        """
        try:
            version = self._version()
        except LostError as error:
            self.waits_for = str(error)
            time.sleep(TICK_S)
            return False
        if version is None:
            self.waits_for = f"`gossamer log follow` to bring {self._server.url} a version"
        elif self._goal is not None and version < self._goal:
            self.waits_for = f"{self._server.url} to get from version {version} to {self._goal}"
        else:
            self.version = version
            return True
        time.sleep(TICK_S / 10)
        return False

    def can_run(self, oldest_version: int) -> bool:
        """As of the last look."""
        return self.version is not None and self.version >= oldest_version

    def look(self, head: int) -> None:
        """Learns its version; LostError for one that has none any more."""
        self.version = self._version()
        if self.version is None:
            raise LostError(f"{self._server.url} began anew, without a version of the log")
        self.behind = head - self.version

    def run(
        self, requests: list[Request], oldest_version: int, on_tick: Callable[[], None]
    ) -> list[Sample]:
        """Samples of a unit."""
        start_s = time.perf_counter()
        try:
            samples = self._server.generate(requests)
        except EngineError as error:
            raise LostError(str(error)) from None
        versions = [span.version for sample in samples for span in sample.spans]
        self._check(max(versions, default=0))
        told = {
            "engine": self.name,
            "what": "generate",
            "version": max(versions, default=self.version),
            "samples": len(samples),
            "tokens": sum(len(sample.token_ids) for sample in samples),
            "generate_s": time.perf_counter() - start_s,
            "cuts": 0,
            "dropped_tokens": 0,
        }
        with suppress(OSError):  # a full disk, and no sample depends on what is told
            self._events.write("engine", told)
        return samples

    def _version(self) -> int | None:
        try:
            version = self._server.version()
        except EngineError as error:
            raise LostError(str(error)) from None
        if version is not None:
            self._check(version)
        return version

    def _check(self, version: int) -> None:
        """Raises LostError for a version that the log does not hold, as after a loss of files."""
        if self._newest is None or version > self._newest:
            try:
                self._newest = self._log.head()
            except (LogError, OSError) as error:
                raise LostError(str(error)) from None
        if self._newest is None or version > self._newest:
            raise LostError(
                f"{self._server.url} serves version {version}, but the newest of the log is"
                f" {self._newest}; expected it to be started anew, to follow from an anchor"
            )

    def audit(self, version: int) -> str | None:
        """State hash at `version`; None where the server's routes for that are not to be had."""
        deadline_s = time.monotonic() + AUDIT_PATIENCE_S
        while True:
            try:
                found = self._server.audit()
            except EngineError as error:
                raise LostError(str(error)) from None
            if found is None or found[0] == version:
                return found and found[1]
            if found[0] is not None and found[0] > version:
                raise ValueError(f"{self.name} is at version {found[0]}, past version {version}")
            if time.monotonic() > deadline_s:
                raise LostError(f"{self._server.url} is at version {found[0]}, not {version}")
            time.sleep(TICK_S / 10)

    def stop(self) -> None:
        """Leaves the server alone."""
