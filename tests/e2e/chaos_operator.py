"""Whoever looks after a run that chaos.py breaks things around.

The one idea: it does by hand what docs/operations.md says and nothing else, and notes it.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_hosts import SHARED, RayHosts
from run_books import all_events

DRIVER_S = 90.0
"""What Ray may take to start the driver of a job."""


@dataclass(kw_only=True)
class Broken:
    """One thing that was broken, and how the run took it."""

    at_s: float
    """Since the run was sent."""
    what: str
    by_operator: list[str]
    """What had to be done by hand."""
    next_step_s: float | None = None
    """From the breaking to the next update never made before; None: the run was over."""
    pause_s: float = 0.0
    """The longest time without any update, up to the fifth such one."""
    made_again: int = 0
    """Updates up to then that had been made before."""

    def taken(self) -> str:
        """A line of the report."""
        if self.next_step_s is None:
            return "the run was over"
        told = f"next new update after {self.next_step_s:.1f} s, longest pause {self.pause_s:.1f} s"
        told += f", {self.made_again} made again" if self.made_again else ""
        return told + (f"; by hand: {', '.join(self.by_operator)}" if self.by_operator else "")


class Operator:
    """Whoever looks after the run; `broken` is the thing that is being got over."""

    def __init__(self, cluster: RayHosts, shared: Path, run_dir: Path, words: list[str]) -> None:
        self.cluster, self._shared, self.run_dir = cluster, shared, run_dir
        self._inside = f"{SHARED}/{run_dir.name}"
        self.broken: Broken | None = None
        for i in range(len(cluster.hosts)):
            cluster.start(i)
        self.start_s = time.time()
        self._send(*words, "--run-dir", self._inside)

    def _send(self, *words: object) -> None:
        sent = self.cluster.call(0, "gossamer", "submit", *words, "--detach")
        assert not sent.returncode, sent.stdout + sent.stderr
        self._sent_s, self._is_there = time.monotonic(), False

    def pid(self, role: str) -> int | None:
        """Of a process of the run that lives."""
        with suppress(FileNotFoundError, ValueError):
            pid = int((self.run_dir / "pids" / role).read_text())
            return pid if self.cluster.where(pid) is not None else None
        return None

    def pool_pid(self) -> int | None:
        """The pool's actor writes no file; Ray names its process."""
        words = ["ip", "netns", "pids", self.cluster.hosts[0].namespace]
        for pid in subprocess.run(words, capture_output=True, text=True).stdout.split():
            with suppress(FileNotFoundError, ProcessLookupError):
                if b"ray::RolloutPool" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
        return None

    def is_finished(self) -> bool:
        if not (self.run_dir / "metrics.jsonl").exists():
            return False
        return any(
            e["event"] == "run_end" and e["reason"] == "finished" for e in all_events(self.run_dir)
        )

    def look(self) -> None:
        """Starts nodes that are gone; resumes the run when its driver is dead."""
        for i in range(1, len(self.cluster.hosts)):
            if not self.cluster.is_running(i) and self.cluster.is_running(0):
                self.cluster.kill(i)
                self.cluster.start(i)
                self._note(f"ray start on host {i}")
        is_there = self.pid("driver") is not None
        self._is_there |= is_there
        is_due = self._is_there or time.monotonic() - self._sent_s > DRIVER_S
        if not is_there and is_due and not self.is_finished():
            self._send("--resume", self._inside)
            self._note("gossamer submit --resume")

    def _note(self, what: str) -> None:
        if self.broken is not None:
            self.broken.by_operator.append(what)

    def break_head(self, away_s: float) -> None:
        """All processes of the head's host die; nodes are stopped before a new head starts."""
        hosts = range(len(self.cluster.hosts))
        for i in hosts:
            self.cluster.kill(i)
            time.sleep(away_s if i == 0 else 0)
        for i in hosts:
            self.cluster.start(i)
        self._note("ray start on all hosts")
        self._send("--resume", self._inside)
        self._note("gossamer submit --resume")
