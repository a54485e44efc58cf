"""One replica of several, as a process.

The one idea: what runs is a command that its user could type, `gossamer train RECIPE replicas=1
train.outer.replica=replica-2 ...` or, where its folder has begun, `gossamer resume ...`.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gossamer.launch.config import RecoveryConfig, RunConfig
from gossamer.launch.controller import CONFIG_FILE, GAVE_UP
from gossamer.launch.lifecycle import Event, Failure, State, after, decide
from gossamer.launch.summary import of_kind, read_events
from gossamer.trainer.metrics import METRICS_FILE

STOP_S = 30.0
"""A replica that is asked to stop has this long before it is killed."""
TAKEN_OVER = "was taken over"
"""In the last words of a replica that another process goes on with."""
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(slots=True)
class Member:
    """One replica as its supervisor sees it."""

    name: str
    index: int
    run_dir: Path
    overrides: list[str]
    """Where it runs: they hold for this start alone."""
    options: list[str]
    """Of `gossamer train`."""
    process: subprocess.Popen | None = None
    failures: list[Failure] = field(default_factory=list)
    started_s: float = 0.0
    """Unix time of the last start."""
    restart_s: float = 0.0
    """When it is started again, on the monotonic clock."""
    state: State = State.WAITING
    """Lost: given up, or gone on with elsewhere."""

    @property
    def restarts(self) -> int:
        """How often it was started again, or is to be."""
        return len(self.failures) - (self.state is State.LOST)

    def enter(self, *events: Event) -> None:
        """The state after these."""
        for event in events:
            self.state = after(self.state, event)

    def start(self, config: RunConfig, recipe: Path) -> None:
        """Starts it where its folder stands."""
        if (self.run_dir / CONFIG_FILE).exists():
            words = ["resume", str(self.run_dir)]
        else:
            words = ["rl" if config.has_rollouts else "train", str(recipe)]
            words += ["--run-dir", str(self.run_dir), *self.options, *_own_overrides(config, self)]
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "logs" / "console.log").open("a") as console:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gossamer.launch.cli", *words, *self.overrides],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is passed on, once
                preexec_fn=_stop_with_parent,
            )
        self.started_s = time.time()
        self.enter(Event.START, Event.READY)  # its own metrics tell how it gets on

    def last_words(self) -> str:
        """Why its process ended, in a sentence."""
        code = self.process.returncode if self.process else 0
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        said = (self.run_dir / "logs" / "console.log").read_text(errors="replace").splitlines()
        told = [line.removeprefix("gossamer: ") for line in said if line.startswith("gossamer: ")]
        # where to look, and how to go on, is its own user's matter
        return told[-1].partition("; see ")[0] if told else f"its process ended with code {code}"


def judge(member: Member, recovery: RecoveryConfig) -> str:
    """What becomes of a replica whose process ended."""
    assert member.process is not None
    if member.process.returncode == 0:
        member.enter(Event.DONE)
        return "finished"
    reason = member.last_words()
    is_final = TAKEN_OVER in reason or GAVE_UP in reason
    member.failures.append(Failure(reason, _saved_step(member.run_dir), is_final))
    member.enter(Event.DIED)
    pause_s = decide(member.failures, recovery).restart_after_s
    if pause_s is None:
        member.enter(Event.GIVEN_UP)
        return "taken over" if TAKEN_OVER in reason else "given up"
    member.restart_s = time.monotonic() + pause_s
    return "died"


def _saved_step(run_dir: Path) -> int:
    events = read_events(run_dir) if (run_dir / METRICS_FILE).exists() else []
    return max((event["step"] for event in of_kind(events, "checkpoint")), default=0)


def member_of(
    run_dir: Path, index: int, address: str | None, url: str, options: list[str]
) -> Member:
    """Replica `index` of the run in `run_dir`, that meets the others at `url`; `address` is its
    Ray cluster's, where it is not the config's."""
    name = name_of(index)
    overrides = [f"train.outer.url={json.dumps(url)}"]
    if address is not None:
        overrides.append(f"cluster.address={json.dumps(address)}")
    member = Member(name, index, run_dir / name, overrides, options)
    if has_finished(member.run_dir):
        member.enter(Event.START, Event.DONE)
    return member


def name_of(index: int) -> str:
    """Of the replica, and of its folder."""
    return f"replica-{index}"


def has_finished(run_dir: Path) -> bool:
    """Whether the run in this folder came to its end."""
    path = run_dir / METRICS_FILE
    events = read_events(run_dir) if path.exists() else []
    return bool(of_kind(events, "run_end", reason="finished"))


def for_all(config: RunConfig) -> RunConfig:
    """With a share of the data for each replica, and all of them waited for in round 0."""
    train, outer = config.train, config.train.outer
    assert outer is not None
    shares = max(config.replicas, train.data.num_replicas)
    expected = max(config.replicas, outer.expected_replicas)
    train = replace(
        train,
        data=replace(train.data, num_replicas=shares),
        outer=replace(outer, expected_replicas=expected),
    )
    return replace(config, train=train)


def _own_overrides(config: RunConfig, member: Member) -> list[str]:
    """What tells one replica from the others, of the same recipe."""
    own = [
        "replicas=1",
        f"train.outer.replica={member.name}",
        f"train.data.replica_index={member.index}",
    ]
    saved = config.train.checkpoint.url
    return own + ([f"train.checkpoint.url={json.dumps(f'{saved}/{member.name}')}"] if saved else [])


def stop_all(members: list[Member]) -> None:
    """As by Ctrl-C; those that do not stop in STOP_S are killed."""
    running: list[Any] = [m.process for m in members if m.process and m.process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    deadline_s = time.monotonic() + STOP_S
    for process in running:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def _stop_with_parent() -> None:
    """In the child: a parent that is killed takes its replicas along, as Ctrl-C would (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGINT)
    # it may have been ignored where this run was begun in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)
