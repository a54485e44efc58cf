"""`gossamer engines`: the engines of a run, and how many are wanted, while it goes.

The one idea: it talks to nobody. What is there it reads from the run's events, what is wanted it
writes into the run's folder, where the pool looks every second.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gossamer.launch.config import RunConfig
from gossamer.launch.pool_wishes import Wish, asked_for, read_wishes, wishes, write_wishes
from gossamer.launch.run_argument import open_here
from gossamer.launch.summary import Event, read_events


@dataclass(slots=True)
class Seen:
    """A place of a pool, as events tell of it."""

    pool: str
    engine: str
    state: str
    version: int | None = None
    note: str = ""


def places_seen(events: Iterable[Event]) -> list[Seen]:
    """The places of the last driver's pools, in the order in which they were made."""
    places: dict[int, Seen] = {}
    for event in events:
        if event["event"] == "pools":
            places = {}
        elif event["event"] != "engine":
            continue
        elif "place" in event:
            number, name = event["place"], event["engine"]
            if number not in places or places[number].engine != name:
                places[number] = Seen(pool=event["pool"], engine=name, state=event["state"])
            seen = places[number]
            seen.state = event["state"]
            waits_for = event.get("waits_for")
            seen.note = f"waits for {waits_for}" if waits_for else str(event.get("reason") or "")
            if event["what"] == "left":
                del places[number]
        if event.get("version") is not None:
            for seen in places.values():
                if seen.engine == event["engine"]:
                    seen.version = event["version"]
                    if seen.state == "running":
                        seen.note = ""  # it has what it waited for
    return [places[number] for number in sorted(places)]


def table(wanted: Mapping[str, Wish], places: list[Seen]) -> str:
    """A line a place, and one a pool about what is wanted."""
    rows = [("POOL", "ENGINE", "STATE", "VERSION", "")]
    for seen in places:
        version = "" if seen.version is None else f"v{seen.version}"
        rows.append((seen.pool, seen.engine, seen.state, version, seen.note))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows]
    for pool, wish in wanted.items():
        servers = f" and {', '.join(wish.urls)}" if wish.urls else ""
        lines.append(f"{pool}: {wish.engines} wanted{servers}")
    return "\n".join(lines)


def add_engines_command(command: argparse.ArgumentParser) -> None:
    """Options of `gossamer engines`; nothing heavy is imported."""
    command.add_argument("run_dir", metavar="RUN", help="its folder, or s3://, ...")
    command.add_argument(
        "wishes",
        nargs="*",
        metavar="WISH",
        help="POOL=N engines; POOL+=URL, POOL-=URL: a server that follows the run's log",
    )
    command.set_defaults(run=run_engines)


def run_engines(arguments: argparse.Namespace) -> None:
    """Shows the engines, after it wrote down what is wished for."""
    from gossamer.launch.recipe import load_recipe

    run_dir: Path = open_here(arguments.run_dir)
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected the folder of a run")
    config: RunConfig = load_recipe(str(path), [])
    if not config.has_rollouts or config.replicas > 1:
        raise ValueError(f"{run_dir} has no engines of its own; expected a run with a grpo phase")
    wanted = wishes(read_wishes(run_dir), config.rollout.all_pools)
    if arguments.wishes:
        wanted = asked_for(arguments.wishes, wanted)
        write_wishes(run_dir, wanted)
    events = read_events(run_dir)
    print(table(wanted, places_seen(events)))
    ends = [event for event in events if event["event"] in ("run_start", "run_end")]
    if ends and ends[-1]["event"] == "run_end":
        print(f"the run has ended: {ends[-1].get('reason')}")
