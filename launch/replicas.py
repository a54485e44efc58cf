"""Several replicas of one run: started, watched, started again.

The one idea: a replica is a `gossamer train` of its own, in a process and a folder of its own, so
the death of one is no more to the others than a link that is cut. What is here only starts them,
takes those that died up again by `gossamer resume`, and tells how they are.

    RUN_DIR/config.json, metrics.jsonl    the run's recipe; what became of its replicas
    RUN_DIR/rounds/                       where they meet, unless train.outer.url says otherwise
    RUN_DIR/replica-0/ ...                each a run's whole folder
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gossamer.comm.outer.retention import clear
from gossamer.launch.cluster import connect
from gossamer.launch.config import RunConfig
from gossamer.launch.controller import (
    CONFIG_FILE,
    REFRESH_S,
    RunError,
    make_room,
    quiet_console,
    rich_console,
    sole_driver,
)
from gossamer.launch.recipe import dump_config, with_absolute_paths
from gossamer.launch.replicas_display import FleetDisplay
from gossamer.launch.replicas_members import (
    RECIPE_FILE,
    ROUNDS_FOLDER,
    leave_recipe,
    open_rounds,
    rounds_url,
)
from gossamer.launch.replicas_report import write_fleet_report
from gossamer.launch.summary import of_kind, read_events
from gossamer.launch.thin_link import thin_links
from gossamer.trainer.metrics import METRICS_FILE, EventLog, drop_torn_lines
from gossamer.trainer.prepare import prepare_run

STOP_S = 30.0
"""A replica that is asked to stop has this long before it is killed."""
RESTART_PAUSE_S = 2.0
TAKEN_OVER = "was taken over"
"""In the last words of a replica that another process goes on with."""
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def start_replicas(config: RunConfig, run_dir: Path, overwrite: bool) -> None:
    """Runs all replicas in a new folder. Raises RunError, also when no replica finished."""
    config = _for_all(with_absolute_paths(config))
    run_dir.mkdir(parents=True, exist_ok=True)
    with sole_driver(run_dir):
        make_room(run_dir, overwrite)
        store = open_rounds(config, run_dir)
        if store is not None and (store.size(RECIPE_FILE) or store.size("outer.json")):
            where = rounds_url(config.train.outer, run_dir)  # type: ignore[arg-type]
            if not overwrite:
                raise RunError(
                    f"{where} holds another run's rounds: expected an empty train.outer.url,"
                    f" --overwrite to delete them, or `gossamer join {where}`"
                )
            clear(store)
        (run_dir / METRICS_FILE).touch()
        dump_config(config, run_dir / CONFIG_FILE)
        _run(config, run_dir)


def resume_replicas(config: RunConfig, run_dir: Path) -> None:
    """Goes on with those that have not finished."""
    with sole_driver(run_dir):
        drop_torn_lines(run_dir)
        if all(_has_finished(run_dir / _name(index)) for index in range(config.replicas)):
            raise RunError(f"{run_dir} has finished; see `gossamer report {run_dir}`")
        _run(config, run_dir)


@dataclass(slots=True)
class Member:
    """One replica as its supervisor sees it."""

    name: str
    index: int
    run_dir: Path
    overrides: list[str]
    """Where it runs: they hold for this start alone."""
    process: subprocess.Popen | None = None
    restarts: int = 0
    started_s: float = 0.0
    """Unix time of the last start."""
    restart_s: float = 0.0
    """When it is started again, on the monotonic clock."""
    state: str = "waiting"
    """waiting, running, finished, or lost: given up, or gone on with elsewhere."""

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "lost")

    def start(self, config: RunConfig, recipe: Path) -> None:
        """Starts it where its folder stands."""
        if (self.run_dir / CONFIG_FILE).exists():
            words = ["resume", str(self.run_dir)]
        else:
            words = ["rl" if config.has_rollouts else "train", str(recipe)]
            words += ["--run-dir", str(self.run_dir), *_own_overrides(config, self)]
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
        self.state, self.started_s = "running", time.time()

    def last_words(self) -> str:
        """Why its process ended, in a sentence."""
        code = self.process.returncode if self.process else 0
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        said = (self.run_dir / "logs" / "console.log").read_text(errors="replace").splitlines()
        told = [line.removeprefix("gossamer: ") for line in said if line.startswith("gossamer: ")]
        # where to look, and how to go on, is its own user's matter
        return told[-1].partition("; see ")[0] if told else f"its process ended with code {code}"


def _run(config: RunConfig, run_dir: Path) -> None:
    with quiet_console(run_dir) as console, ExitStack() as stack:
        prepare_run(config.train, run_dir, config.name)
        store = open_rounds(config, run_dir)
        if store is not None:
            leave_recipe(store, config, run_dir)
        events = EventLog(run_dir)
        events.write("fleet_start", {"name": config.name, "replicas": config.replicas})
        urls, join_url, shaped_by = stack.enter_context(_ways(config, run_dir))
        address = stack.enter_context(_cluster(config, run_dir))
        members = [_member(config, run_dir, index, address, url) for index, url in enumerate(urls)]
        display = FleetDisplay(run_dir, members, store, join_url, shaped_by, rich_console(console))
        display.start()
        try:
            _watch(config, run_dir, members, events, display)
            ended = [member.name for member in members if member.state == "finished"]
            reason = "finished" if ended else "no replica finished"
        except KeyboardInterrupt:
            reason = "stopped by its user"
            raise KeyboardInterrupt(f"`gossamer resume {run_dir}` goes on") from None
        except BaseException as error:
            reason = str(error)
            raise
        finally:
            _stop(members)
            events.write("run_end", {"reason": reason})
            display.stop()
        report = write_fleet_report(run_dir)
        print(f"report: {report}", file=console, flush=True)
        if not ended:
            raise RunError(
                f"no replica finished; see {run_dir}/replica-*/logs and go on with"
                f" `gossamer resume {run_dir}`"
            )


def _watch(
    config: RunConfig, run_dir: Path, members: list[Member], events: EventLog, display: FleetDisplay
) -> None:
    """Returns when all have finished or are lost."""
    while not all(member.is_over for member in members):
        for member in members:
            if member.state == "waiting" and time.monotonic() >= member.restart_s:
                member.start(config, run_dir / CONFIG_FILE)
                what = "restarted" if member.restarts else "started"
                events.write("replica", {"replica": member.name, "what": what})
            elif member.state == "running" and member.process and member.process.poll() is not None:
                what = _judge(member, config.fleet.max_restarts)
                told = {} if what == "finished" else {"reason": member.last_words()}
                events.write("replica", {"replica": member.name, "what": what, **told})
        display.refresh()
        time.sleep(REFRESH_S)


def _judge(member: Member, max_restarts: int) -> str:
    """What becomes of a replica whose process ended."""
    assert member.process is not None
    if member.process.returncode == 0:
        member.state = "finished"
        return "finished"
    if TAKEN_OVER in member.last_words():
        member.state = "lost"
        return "taken over"
    if member.restarts >= max_restarts:
        member.state = "lost"
        return "given up"
    member.restarts += 1
    member.restart_s = time.monotonic() + RESTART_PAUSE_S * member.restarts
    member.state = "waiting"
    return "died"


def _member(config: RunConfig, run_dir: Path, index: int, address: str | None, url: str) -> Member:
    name = _name(index)
    overrides = [f"train.outer.url={json.dumps(url)}"]
    if address is not None:
        overrides.append(f"cluster.address={json.dumps(address)}")
    member = Member(name, index, run_dir / name, overrides)
    if _has_finished(member.run_dir):
        member.state = "finished"
    return member


def _name(index: int) -> str:
    return f"replica-{index}"


def _has_finished(run_dir: Path) -> bool:
    path = run_dir / METRICS_FILE
    events = read_events(run_dir) if path.exists() else []
    return bool(of_kind(events, "run_end", reason="finished"))


def _for_all(config: RunConfig) -> RunConfig:
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


@contextmanager
def _ways(config: RunConfig, run_dir: Path) -> Iterator[tuple[list[str], str, str]]:
    """By which URL each replica reaches the rounds, and one that joins; and what shapes links."""
    assert config.train.outer is not None
    if config.fleet.link_mbit is None:
        url = rounds_url(config.train.outer, run_dir)
        yield [url] * config.replicas, url, ""
        return
    with thin_links(run_dir / ROUNDS_FOLDER, config.replicas + 1, config.fleet.link_mbit) as links:
        *urls, spare = links.urls
        yield urls, spare, f"{config.fleet.link_mbit:g} Mbit/s links by {links.shaped_by}"


@contextmanager
def _cluster(config: RunConfig, run_dir: Path) -> Iterator[str | None]:
    """The address of a cluster for all, started here; None where the config names one."""
    if config.cluster.address is not None:
        yield None
        return
    with connect(config, run_dir):
        import ray

        yield ray.get_runtime_context().gcs_address


def _stop(members: list[Member]) -> None:
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
