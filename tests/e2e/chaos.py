"""Breaks a tiny RL run on a Ray cluster of three hosts again and again, then audits its books.

The one idea: what is broken when is a function of the seed (and of what is there to be broken); all
the operator does is what docs/operations.md says: start nodes that are gone, and
`gossamer submit --resume` once the driver is dead. Needs Linux, root and iproute2.

    python tests/e2e/chaos.py --seed 3 --minutes 10 --json chaos.json
    python tests/e2e/chaos.py --seed 3 --minutes 4 --staleness 1    # audits, and bits that flip
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))

from chaos_operator import DRIVER_S, Broken, Operator  # noqa: E402
from gossamer.launch.testbed import unusable  # noqa: E402
from ray_hosts import ray_hosts  # noqa: E402
from run_books import (  # noqa: E402
    all_events,
    faults_beside,
    faults_of_samples,
    faults_of_versions,
    final_history,
)
from tiny_run import SETTINGS  # noqa: E402

T = TypeVar("T")
CPUS = [0, 2, 2]
"""The head's host runs driver, pool and replica; two ranks and two engines are on the others."""
DISK = "400m"
STEPS_PER_MINUTE = 60
ENOUGH = 5
"""New updates after which a thing that was broken is got over."""
STALL_S = 300.0
"""Without them for so long is a fault."""
ACTORS = {"engine": 4, "rank": 4, "pool": 1, "replica": 1, "driver": 1}
THINGS = {"actor": 10, "node": 2, "head": 1, "link": 3, "disk": 2}
"""What is broken, and how often in proportion."""
FLIPS = 8
"""The same, of bits of an engine's live weights, where it is audited."""
AUDITED = {
    "engine": "flippable_engine:FlippableEngine",
    "audit_every_versions": 3,
    "max_behind": 8,
}


class Chaos:
    """Draws when to break what, and breaks it."""

    def __init__(self, operator: Operator, shared: Path, seed: int, has_audits: bool) -> None:
        self._operator, self._cluster, self._shared = operator, operator.cluster, shared
        self._random, self._pauses = random.Random(seed), random.Random(f"pauses {seed}")
        self._things = {**THINGS, "flip": FLIPS} if has_audits else THINGS

    def pause_s(self) -> float:
        """Until something is to be broken."""
        return self._pauses.uniform(1, 10)

    def break_something(self) -> Broken:
        """What was broken; a cut link and a full disk are mended again before it returns.

        Raises LookupError where there is nothing to be broken although the run goes on.
        """
        draw = self._random
        thing = draw.choices([*self._things], [*self._things.values()])[0]
        broken = Broken(at_s=time.time() - self._operator.start_s, what=thing, by_operator=[])
        self._operator.broken = broken
        getattr(self, f"_{thing}")(broken)
        return broken

    def _actor(self, broken: Broken) -> None:
        kind = self._random.choices([*ACTORS], [*ACTORS.values()])[0]
        number = self._random.random()
        role, pid = self._wait_for(lambda: self._living(kind, number), f"a living {kind}")
        os.kill(pid, signal.SIGKILL)
        broken.what = f"SIGKILL to {role}"

    def _living(self, kind: str, number: float) -> tuple[str, int] | None:
        """(role, pid) of one of the kind; number: in [0, 1), which one."""
        operator = self._operator
        if kind == "pool":
            pid = operator.pool_pid()
            return (kind, pid) if pid is not None else None
        roles = sorted(path.name for path in (operator.run_dir / "pids").glob(f"{kind}*"))
        living = [(role, pid) for role in roles if (pid := operator.pid(role)) is not None]
        return living[int(number * len(living))] if living else None

    def _wait_for(self, found: Callable[[], T | None], what: str) -> T:
        deadline_s = time.monotonic() + STALL_S
        while (it := found()) is None:
            if time.monotonic() > deadline_s or self._operator.is_finished():
                raise LookupError(f"{what} was not found within {STALL_S:g} s")
            self._operator.look()
            time.sleep(0.2)
        return it

    def _flip(self, broken: Broken) -> None:
        """Over once the engine that was hit is drained."""
        operator, since_s = self._operator, time.time()
        (operator.run_dir / "flip").touch()

        def drained() -> str | None:
            for event in all_events(operator.run_dir):
                is_ours = event["event"] == "engine" and event["what"] == "drained"
                if is_ours and event["time_s"] > since_s and "behind" not in event["reason"]:
                    return event["engine"]
            return None

        broken.what = f"bits flipped in {self._wait_for(drained, 'the engine whose bits flipped')}"

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


def run_chaos(
    folder: Path, seed: int, minutes: float, steps: int | None = None, staleness: int = 0
) -> dict:
    """Breaks things for so long or until the run has finished; the report, of plain data.

    folder: an empty one, for all that is written; minutes: from the first updates on; staleness:
    with more than 0 engines are audited, bits flip in them, and the run's books are checked, not
    its final state, which is then not promised. Its "faults" are empty when all is well.
    """
    recipe, shared = folder / "tiny.yaml", folder / "shared"
    shared.mkdir()
    steps = steps or round(minutes * STEPS_PER_MINUTE)
    recipe.write_text(json.dumps(_recipe(steps, "slow_length_of_answer", staleness)))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "gossamer-chaos", shared], check=True
    )
    try:
        with ray_hosts(folder, CPUS, shared=shared) as cluster:
            (cluster.own(0) / recipe.name).write_text(recipe.read_text())
            operator = Operator(cluster, shared, shared / "run", [f"/tmp/{recipe.name}"])
            chaos = Chaos(operator, shared, seed, has_audits=staleness > 0)
            told, faults = _break_until(operator, chaos, minutes * 60)
            whole_s = time.time() - operator.start_s
        subprocess.run(["cp", "-r", operator.run_dir, folder / "run"], check=True)
    finally:
        subprocess.run(["umount", "-l", shared], check=True)
    if not faults:
        faults = faults_of_samples(folder / "run") + faults_of_versions(folder / "run")
        if not (folder / "run" / "summary.json").exists():
            faults.append("the driver ended without a summary")
    if not faults and not staleness:
        recipe.write_text(json.dumps(_recipe(steps, "length_of_answer", staleness)))
        faults = _beside_undisturbed(folder / "run", folder / "whole", recipe)
    history, again, late = final_history(folder / "run")
    return {
        "seed": seed,
        "minutes": minutes,
        "staleness": staleness,
        "seconds": round(whole_s, 1),
        "steps": len(history),
        "steps_made_again": again,
        "steps_told_by_dead_attempts": late,
        "drained": sum(e.get("what") == "drained" for e in all_events(folder / "run")),
        "attempts": max(e["attempt"] for e in all_events(folder / "run") if "attempt" in e),
        "broken": [asdict(each) for each in told],
        "faults": faults,
    }


def _recipe(steps: int, reward: str, staleness: int) -> dict:
    rl = {**SETTINGS["rl"], "reward": f"tiny_run:{reward}", "drop_constant_groups": False}
    rl["max_staleness"] = staleness
    rollout = {"engines": 2, **(AUDITED if staleness else {})}
    warm, policy = SETTINGS["phases"]
    phases = [warm, {**policy, "max_steps": steps, "lr": 1e-4}]
    checkpoint = {"every_steps": 10, "keep_last": 3, "asynchronous": True}
    train = {**SETTINGS, "rl": rl, "phases": phases, "checkpoint": checkpoint}
    recovery = {"max_failures": 20, "pause_s": 1.0, "max_pause_s": 5.0}
    return {"name": "chaos", "train": train, "rollout": rollout, "recovery": recovery}


def _break_until(operator: Operator, chaos: Chaos, for_s: float) -> tuple[list[Broken], list[str]]:
    told: list[Broken] = []
    operator.broken = Broken(at_s=0.0, what="start", by_operator=[])
    if not _get_over(operator, operator.broken, operator.start_s, 0):
        return told, [f"no {ENOUGH} updates within {STALL_S:g} s of the start"]
    begun_s = time.time()
    while time.time() - begun_s < for_s:
        if not _look_for(operator, chaos.pause_s()):
            break
        since_s, last = time.time(), max(step for _, step in _updates(operator))
        try:
            broken = chaos.break_something()
        except LookupError as error:
            if operator.is_finished():
                break
            return told, [str(error)]
        told.append(broken)
        print(f"{broken.at_s:6.0f} s  {broken.what}", flush=True)
        if not _get_over(operator, broken, since_s, last):
            return told, [f"no {ENOUGH} new updates within {STALL_S:g} s after {broken.what}"]
        print(f"          {broken.taken()}", flush=True)
    operator.broken = None
    while _look_for(operator, 10):
        if time.time() - begun_s > 3 * for_s + STALL_S:
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


def _beside_undisturbed(run_dir: Path, whole: Path, recipe: Path) -> list[str]:
    """Beside a run of the same recipe on this machine that nothing happens to."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "gossamer.launch.cli", "rl", recipe, "--run-dir", whole]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return faults_beside(run_dir, whole)


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
    parser.add_argument(
        "--staleness", type=int, default=0, help="train.rl.max_staleness; above 0 with audits"
    )
    parser.add_argument("--json", metavar="OUT", help="the report, as a file")
    parser.add_argument("--keep", metavar="FOLDER", help="a new folder for all that is written")
    arguments = parser.parse_args()
    if reason := unusable():
        print(f"chaos: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is mounted is to be unmounted
    with _folder(arguments.keep) as folder:
        given = arguments.seed, arguments.minutes, arguments.steps, arguments.staleness
        report = run_chaos(folder, *given)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "broken"}, indent=1))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
