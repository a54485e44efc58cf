"""Breaks a tiny RL run on a Ray cluster of three hosts again and again, then audits its books.

The one idea: what is broken when is a function of the seed (and of what is there to be broken); all
the operator does is what docs/operations.md says: start nodes that are gone, and
`gossamer submit --resume` once the driver is dead. Needs Linux, root and iproute2.

    python tests/e2e/chaos.py --seed 3 --minutes 10 --json chaos.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gossamer.launch.testbed import unusable  # noqa: E402
from ray_hosts import SHARED, RayHosts, ray_hosts  # noqa: E402
from run_books import (  # noqa: E402
    all_events,
    faults_beside,
    faults_of_samples,
    faults_of_versions,
    final_history,
)
from tiny_run import SETTINGS  # noqa: E402

CPUS = [0, 2, 2]
"""The head's host runs driver, pool and replica; two ranks and two engines are on the others."""
DISK = "400m"
STEPS_PER_MINUTE = 60
ENOUGH = 5
"""New updates after which a thing that was broken is got over."""
DRIVER_S = 90.0
"""What Ray may take to start the driver of a job."""
STALL_S = 300.0
"""Without them for so long is a fault."""
ACTORS = {"engine": 4, "rank": 4, "pool": 1, "replica": 1, "driver": 1}
THINGS = {"actor": 10, "node": 2, "head": 1, "link": 3, "disk": 2}
"""What is broken, and how often in proportion."""


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


class Chaos:
    """Draws what to break, and breaks it."""

    def __init__(self, operator: Operator, shared: Path, seed: int) -> None:
        self._operator, self._cluster, self._shared = operator, operator.cluster, shared
        self._random = random.Random(seed)

    def break_something(self) -> Broken:
        """What was broken; a cut link and a full disk are mended again before it returns."""
        draw = self._random
        thing = draw.choices([*THINGS], [*THINGS.values()])[0]
        broken = Broken(at_s=time.time() - self._operator.start_s, what=thing, by_operator=[])
        self._operator.broken = broken
        getattr(self, f"_{thing}")(broken)
        return broken

    def _actor(self, broken: Broken) -> None:
        kind = self._random.choices([*ACTORS], [*ACTORS.values()])[0]
        number, operator = self._random.random(), self._operator
        if kind == "pool":
            role, pid = "pool", operator.pool_pid()
        else:
            names = sorted(p.name for p in (operator.run_dir / "pids").glob(f"{kind}*"))
            living = [name for name in names if operator.pid(name) is not None]
            role = living[int(number * len(living))] if living else kind
            pid = operator.pid(role)
        broken.what = f"SIGKILL to {role}" if pid else f"SIGKILL to {role}: none lives"
        if pid:
            os.kill(pid, signal.SIGKILL)

    def _node(self, broken: Broken) -> None:
        i, away_s = self._random.choice((1, 2)), self._random.uniform(2, 15)
        broken.what = f"power cut of host {i}, {away_s:.0f} s"
        self._cluster.hosts[i].cut()  # the dead say no goodbye
        self._cluster.kill(i)
        time.sleep(away_s)
        self._cluster.hosts[i].restore()

    def _head(self, broken: Broken) -> None:
        away_s = self._random.uniform(1, 5)
        broken.what = f"SIGKILL to all of the head's host, {away_s:.0f} s"
        self._operator.break_head(away_s)

    def _link(self, broken: Broken) -> None:
        i = self._random.choice((0, 1, 2))
        away_s = self._random.choice((self._random.uniform(1, 8), self._random.uniform(30, 60)))
        broken.what = f"link of host {i} cut, {away_s:.0f} s"
        self._cluster.hosts[i].cut()
        time.sleep(away_s)
        self._cluster.hosts[i].restore()

    def _disk(self, broken: Broken) -> None:
        away_s, filler = self._random.uniform(2, 10), self._shared / "filler"
        broken.what = f"disk full, {away_s:.0f} s"
        end_s = time.monotonic() + away_s
        with filler.open("wb", buffering=0) as file:
            while time.monotonic() < end_s:
                try:
                    file.write(bytes(1 << 20))
                except OSError:
                    with suppress(OSError):
                        file.write(bytes(1 << 10))
                    time.sleep(0.02)
        filler.unlink()


def run_chaos(folder: Path, seed: int, minutes: float, steps: int | None = None) -> dict:
    """Breaks things for so long or until the run has finished; the report, of plain data.

    folder: an empty one, for all that is written. Its "faults" are empty when all is well.
    """
    recipe, shared = folder / "tiny.yaml", folder / "shared"
    shared.mkdir()
    steps = steps or round(minutes * STEPS_PER_MINUTE)
    recipe.write_text(json.dumps(_recipe(steps, "slow_length_of_answer")))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "gossamer-chaos", shared], check=True
    )
    try:
        with ray_hosts(folder, CPUS, shared=shared) as cluster:
            (cluster.own(0) / recipe.name).write_text(recipe.read_text())
            operator = Operator(cluster, shared, shared / "run", [f"/tmp/{recipe.name}"])
            told, faults = _break_until(operator, Chaos(operator, shared, seed), minutes * 60)
            whole_s = time.time() - operator.start_s
        subprocess.run(["cp", "-r", operator.run_dir, folder / "run"], check=True)
    finally:
        subprocess.run(["umount", "-l", shared], check=True)
    if not faults:
        recipe.write_text(json.dumps(_recipe(steps, "length_of_answer")))
        faults = _audit(folder / "run", folder / "whole", recipe)
    history, again, late = final_history(folder / "run")
    return {
        "seed": seed,
        "minutes": minutes,
        "seconds": round(whole_s, 1),
        "steps": len(history),
        "steps_made_again": again,
        "steps_told_by_dead_attempts": late,
        "attempts": max(e["attempt"] for e in all_events(folder / "run") if "attempt" in e),
        "broken": [asdict(each) for each in told],
        "faults": faults,
    }


def _recipe(steps: int, reward: str) -> dict:
    rl = {**SETTINGS["rl"], "reward": f"tiny_run:{reward}", "drop_constant_groups": False}
    warm, policy = SETTINGS["phases"]
    phases = [warm, {**policy, "max_steps": steps, "lr": 1e-4}]
    checkpoint = {"every_steps": 10, "keep_last": 3, "asynchronous": True}
    train = {**SETTINGS, "rl": rl, "phases": phases, "checkpoint": checkpoint}
    recovery = {"max_failures": 20, "pause_s": 1.0, "max_pause_s": 5.0}
    return {"name": "chaos", "train": train, "rollout": {"engines": 2}, "recovery": recovery}


def _break_until(operator: Operator, chaos: Chaos, for_s: float) -> tuple[list[Broken], list[str]]:
    told: list[Broken] = []
    pauses = random.Random(len(THINGS))
    operator.broken = Broken(at_s=0.0, what="start", by_operator=[])
    if not _get_over(operator, operator.broken, operator.start_s, 0):
        return told, [f"no {ENOUGH} updates within {STALL_S:g} s of the start"]
    while time.time() - operator.start_s < for_s:
        if not _look_for(operator, pauses.uniform(1, 10)):
            break
        since_s, last = time.time(), max(step for _, step in _updates(operator))
        broken = chaos.break_something()
        told.append(broken)
        print(f"{broken.at_s:6.0f} s  {broken.what}", flush=True)
        if not _get_over(operator, broken, since_s, last):
            return told, [f"no {ENOUGH} new updates within {STALL_S:g} s after {broken.what}"]
        print(f"          {broken.taken()}", flush=True)
    operator.broken = None
    while _look_for(operator, 10):
        if time.time() - operator.start_s > 3 * for_s + STALL_S:
            return told, ["the run did not finish once it was left in peace"]
    end_s = time.monotonic() + DRIVER_S
    while operator.pid("driver") is not None and time.monotonic() < end_s:
        time.sleep(0.2)  # it writes its summary
    return told, []


def _look_for(operator: Operator, seconds: float) -> bool:
    """Lets the operator look for so long; False once the run has finished."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if operator.is_finished():
            return False
        operator.look()
        time.sleep(0.2)
    return True


def _updates(operator: Operator) -> list[tuple[float, int]]:
    """(unix time, step) of all that were ever made, in the order of time."""
    if not (operator.run_dir / "metrics.jsonl").exists():
        return []
    found = [e for e in all_events(operator.run_dir) if e["event"] == "train_step"]
    return sorted((event["time_s"], event["step"]) for event in found)


def _get_over(operator: Operator, broken: Broken, since_s: float, last: int) -> bool:
    """Until the fifth update after `last`, the newest step by then; False for a stall."""
    deadline_s = time.time() + STALL_S
    while True:
        updates = _updates(operator)
        after = [(at_s, step) for at_s, step in updates if at_s > since_s]
        is_over = operator.is_finished() or any(step >= last + ENOUGH for _, step in after)
        if is_over:
            break
        if time.time() > deadline_s:
            return False
        operator.look()
        time.sleep(0.2)
    first = next((at_s for at_s, step in after if step > last), None)
    broken.next_step_s = None if first is None else round(first - since_s, 1)
    times = [max((t for t, _ in updates if t <= since_s), default=since_s), *(t for t, _ in after)]
    broken.pause_s = round(max((b - a for a, b in pairwise(times)), default=0.0), 1)
    broken.made_again = sum(step <= last for _, step in after)
    return True


def _audit(run_dir: Path, whole: Path, recipe: Path) -> list[str]:
    """By the books, and beside an undisturbed run of the same recipe on this machine."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "gossamer.launch.cli", "rl", recipe, "--run-dir", whole]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    faults = faults_of_samples(run_dir) + faults_of_versions(run_dir)
    if not (run_dir / "summary.json").exists():
        faults.append("the driver ended without a summary")
    return faults + faults_beside(run_dir, whole)


@contextmanager
def _folder(kept: str | None) -> Iterator[Path]:
    if kept is not None:
        Path(kept).mkdir(parents=True)
        yield Path(kept).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="gossamer-chaos-") as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, help="RL updates; default: so many a minute")
    parser.add_argument("--json", metavar="OUT", help="the report, as a file")
    parser.add_argument("--keep", metavar="FOLDER", help="a new folder for all that is written")
    arguments = parser.parse_args()
    if reason := unusable():
        print(f"chaos: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is mounted is to be unmounted
    with _folder(arguments.keep) as folder:
        report = run_chaos(folder, arguments.seed, arguments.minutes, arguments.steps)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "broken"}, indent=1))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
