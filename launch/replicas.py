"""Several replicas of one run: started, watched, started again.

The one idea: a replica is a `gossamer train` of its own, in a process and a folder of its own, so
the death of one is no more to the others than a link that is cut. What is here only starts them,
takes those that died up again by `gossamer resume` as launch/lifecycle.py decides, and tells how
they are.

    RUN_DIR/config.json, metrics.jsonl    the run's recipe; what became of its replicas
    RUN_DIR/rounds/                       where they meet, unless train.outer.url says otherwise
    RUN_DIR/replica-0/ ...                each a run's whole folder
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

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
from gossamer.launch.lifecycle import State
from gossamer.launch.quantities import format_bytes, format_count
from gossamer.launch.recipe import dump_config, with_absolute_paths
from gossamer.launch.replicas_display import FleetDisplay
from gossamer.launch.replicas_members import (
    RECIPE_FILE,
    ROUNDS_FOLDER,
    leave_recipe,
    open_rounds,
    rounds_url,
)
from gossamer.launch.replicas_process import (
    Member,
    for_all,
    has_finished,
    judge,
    member_of,
    name_of,
    stop_all,
)
from gossamer.launch.replicas_report import write_fleet_report
from gossamer.launch.thin_link import thin_links
from gossamer.trainer.metrics import METRICS_FILE, EventLog, drop_torn_lines
from gossamer.trainer.prepare import prepare_run


def start_replicas(config: RunConfig, run_dir: Path, overwrite: bool) -> None:
    """Runs all replicas in a new folder. Raises RunError, also when no replica finished."""
    config = for_all(with_absolute_paths(config))
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
        _run(config, run_dir, ["--overwrite"] if overwrite else [])


def resume_replicas(config: RunConfig, run_dir: Path) -> None:
    """Goes on with those that have not finished."""
    with sole_driver(run_dir):
        drop_torn_lines(run_dir)
        if all(has_finished(run_dir / name_of(index)) for index in range(config.replicas)):
            raise RunError(f"{run_dir} has finished; see `gossamer report {run_dir}`")
        _run(config, run_dir, [])


def _run(config: RunConfig, run_dir: Path, options: list[str]) -> None:
    with quiet_console(run_dir) as console, ExitStack() as stack:
        prepare_run(config.train, run_dir, config.name)
        store = open_rounds(config, run_dir)
        if store is not None:
            leave_recipe(store, config, run_dir)
        events = EventLog(run_dir)
        events.write("fleet_start", {"name": config.name, "replicas": config.replicas})
        urls, join_url, shaped_by = stack.enter_context(_ways(config, run_dir))
        address = stack.enter_context(_cluster(config, run_dir))
        members = [
            member_of(run_dir, index, address, url, options) for index, url in enumerate(urls)
        ]
        display = FleetDisplay(run_dir, members, store, join_url, shaped_by, rich_console(console))
        display.start()
        try:
            _watch(config, run_dir, members, events, display)
            ended = [member.name for member in members if member.state is State.FINISHED]
            reason = "finished" if ended else "no replica finished"
        except KeyboardInterrupt:
            reason = "stopped by its user"
            raise KeyboardInterrupt(f"`gossamer resume {run_dir}` goes on") from None
        except BaseException as error:
            reason = str(error)
            raise
        finally:
            stop_all(members)
            events.write("run_end", {"reason": reason})
            display.stop()
        report = write_fleet_report(run_dir)
        _print_outcome(console, json.loads((run_dir / "summary.json").read_text()), report)
        if not ended:
            raise RunError(
                f"no replica finished; see {run_dir}/replica-*/logs and go on with"
                f" `gossamer resume {run_dir}`"
            )


def _print_outcome(console: IO[str], summary: dict[str, Any], report: Path) -> None:
    told = {
        "rounds": summary["rounds"],
        "tokens counted": format_count(summary["tokens"]),
        "on the wire": format_bytes(summary["wire_bytes"]),
        "restarts": summary["restarts"],
        "joined": ", ".join(summary["joined"]) or "none",
    }
    lines = [f"{name:>20}  {value}" for name, value in told.items()]
    equal = summary["hashes_equal"]
    if equal is not None:
        verdict = "held the same weights, bit for bit," if equal else "DIFFERED"
        lines.append(f"the replicas {verdict} after {'every' if equal else 'some'} round")
    print("\n".join([*lines, f"report: {report}"]), file=console, flush=True)
    if equal is False:
        raise RunError("the replicas' weights differ; see state_hash in their outer_round events")


def _watch(
    config: RunConfig, run_dir: Path, members: list[Member], events: EventLog, display: FleetDisplay
) -> None:
    """Returns when all have finished or are lost."""
    while not all(member.state.is_over for member in members):
        for member in members:
            if member.state is State.WAITING and time.monotonic() >= member.restart_s:
                member.start(config, run_dir / CONFIG_FILE)
                what = "restarted" if member.failures else "started"
                events.write("replica", {"replica": member.name, "what": what})
            elif (
                member.process
                and member.state is State.RUNNING
                and member.process.poll() is not None
            ):
                what = judge(member, config.recovery)
                told = {} if what == "finished" else {"reason": member.last_words()}
                events.write("replica", {"replica": member.name, "what": what, **told})
        display.refresh()
        time.sleep(REFRESH_S)


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
