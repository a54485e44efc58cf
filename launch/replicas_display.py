"""Several replicas as they go, in the terminal: a row each, and what became of the last round.

The one idea: as the display of one run it only reads: the metrics of each replica, and the records
of rounds, which tell also of replicas that joined from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gossamer.comm.manifest import LogError
from gossamer.comm.outer.record import Record, record_name, unpack_record
from gossamer.comm.store import Store
from gossamer.launch.display import PLAIN_EVERY_S, EventTail, RunState
from gossamer.launch.lifecycle import State
from gossamer.launch.quantities import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
)
from gossamer.launch.summary import Event

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LOOK_S = 1.0
"""Between two looks at the store."""
NEWS_LINES = 5


class Shown(Protocol):
    """A replica, as far as it is shown."""

    name: str
    run_dir: Path
    started_s: float
    """Unix time."""

    @property
    def state(self) -> str: ...

    @property
    def restarts(self) -> int: ...


class RoundTail:
    """Reads the records of rounds as they come; a store that does not answer is asked again."""

    def __init__(self, store: Store | None) -> None:
        self._store, self._next, self._looked_s = store, 0, 0.0
        self.is_open = store is not None
        self.last: Record | None = None

    def read(self) -> None:
        if self._store is None or time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        try:
            while self._store.size(name := record_name(self._next)) is not None:
                self.last = unpack_record(self._store.get(name), name)
                self._next += 1
        except (OSError, LogError):
            pass


class ReplicaRow:
    """One replica's numbers, brought up to date event by event."""

    def __init__(self, replica: Shown) -> None:
        self.replica = replica
        self.run, self.sent_bytes = RunState(), 0
        self.round: Event = {}
        self._tail, self._trained_s = EventTail(replica.run_dir), 0.0
        self._restart_s = 0.0

    def read(self) -> list[str]:
        """Takes new events in; why its trainer died, or waits, where it did."""
        news = []
        for event in self._tail.read():
            self.run.take(event)
            match event["event"]:
                case "train_step":
                    self._trained_s = event["time_s"]
                case "outer_round":
                    self.round = event
                    self.sent_bytes += event.get("wire_bytes_sent", 0)
                case "lifecycle" if event["why"]:
                    news.append(event["why"])
                    self._restart_s = event["time_s"]
        return news

    @property
    def state(self) -> str:
        begun_s = max(self.replica.started_s, self._restart_s)
        if self.replica.state == State.RUNNING and self._trained_s < begun_s:
            return "restarting" if self.restarts or self._restart_s else "starting"
        died = self.replica.state == State.WAITING and self.replica.restarts
        return "died" if died else self.replica.state

    @property
    def restarts(self) -> int:
        """Of its process, and of its trainer alone."""
        return max(self.replica.restarts, self.run.attempts - 1)

    def cells(self) -> list[str]:
        done, total = self.run.steps
        step, last = self.run.step, self.round
        busy = last.get("utilisation")
        return [
            self.replica.name,
            self.state,
            f"{done:,}" + (f" of {total:,}" if total else "") if step else "",
            format_number(step["loss"]) if step else "",
            format_count(step.get("tokens_per_s")) if step else "",
            str(last["round"]) if last else "",
            format_bytes(self.sent_bytes) if self.sent_bytes else "",
            format_percent(busy) if busy is not None else "",
            str(self.restarts or ""),
        ]


HEADS = ("replica", "", "step", "loss", "tokens/s", "round", "sent", "busy", "restarts")


class FleetDisplay:
    """Shows the replicas of RUN_DIR: redrawn at each `refresh`, or plain lines elsewhere."""

    def __init__(
        self,
        run_dir: Path,
        replicas: Sequence[Shown],
        store: Store | None,
        join_url: str,
        links: str,
        console: Console,
    ) -> None:
        from rich.live import Live

        self._console, self._rounds = console, RoundTail(store)
        self._rows = [ReplicaRow(replica) for replica in replicas]
        self._tail, self._name = EventTail(run_dir), run_dir.name
        self._news: list[str] = []
        self._hints = [links] if links else []
        if store is not None:
            self._hints.append(f"one more replica: gossamer join {join_url}")
        self._live = Live(console=console, auto_refresh=False)
        self._started_s = self._printed_s = time.monotonic()

    def start(self) -> None:
        if self._console.is_terminal:
            self._live.start()
        else:
            for hint in self._hints:
                self._print(hint)
        self.refresh()

    def refresh(self) -> None:
        """Reads what is new and shows it. Cheap: call it a few times a second."""
        for row in self._rows:
            for why in row.read():
                self._tell(row.replica.name, why)
        self._rounds.read()
        for event in self._tail.read():
            if event["event"] == "replica" and event["what"] != "started":
                why = f": {event['reason']}" if event.get("reason") else ""
                self._tell(event["replica"], event["what"] + why)
        if self._console.is_terminal:
            self._live.update(self.panel(), refresh=True)
        elif time.monotonic() - self._printed_s >= PLAIN_EVERY_S:
            self._print(self.line())

    def stop(self) -> None:
        self.refresh()
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._print(self.line())

    def line(self) -> str:
        """All replicas in one line."""
        told = [self._clock(), self.round_line()]
        for row in self._rows:
            name, state, step, loss, *_ = row.cells()
            told.append(
                f"{name} step {step} loss {loss}" if state == "running" else f"{name} {state}"
            )
        return "  ".join(filter(None, told))

    def round_line(self) -> str:
        """What became of the last round that is settled."""
        record = self._rounds.last
        if record is None:
            return "no round settled yet" if self._rounds.is_open else ""
        names = [
            each.replica + (" (late)" if each.round < record.round else "")
            for each in record.counted
        ]
        line = f"round {record.round}: {', '.join(names)}"
        return line + "".join(f"; {who} refused: {why}" for who, why in record.refused.items())

    def panel(self) -> RenderableType:
        """All replicas as a panel."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=None, expand=True, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False
        )
        for head in HEADS:
            table.add_column(head, no_wrap=True, justify="left" if head in HEADS[:3] else "right")
        for row in self._rows:
            bad = "bold red" if row.state in ("died", "restarting", "lost") else ""
            table.add_row(*(Text(cell, bad) for cell in row.cells()))
        below = [Text(self.round_line()), *(Text(hint, "dim") for hint in self._hints)]
        below += [Text(news, "red") for news in self._news[-NEWS_LINES:]]
        title = Text.assemble("gossamer · ", (self._name, "bold"))
        return Panel(Group(table, Text(), *below), title=title, subtitle=self._clock())

    def _tell(self, name: str, what: str) -> None:
        news = f"{self._clock()} {name} {what}"
        self._news.append(news)
        if not self._console.is_terminal:
            self._print(news)

    def _clock(self) -> str:
        return f"[{format_duration(round(time.monotonic() - self._started_s))}]"

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._printed_s = time.monotonic()
