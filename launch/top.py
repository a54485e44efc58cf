"""`gossamer top`: a run as it goes, from any terminal that sees its folder.

The one idea: the panel of the run's own display and, below it, where everyone's last seconds went:
the report's Gantt chart over a window, as bars.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.launch.display import EventTail, RunState
from gossamer.launch.quantities import format_count, format_duration
from gossamer.launch.run_argument import open_here
from gossamer.launch.summary import Event, of_kind
from gossamer.trainer.metrics import has_events
from gossamer.trainer.run_folder import where_of

if TYPE_CHECKING:
    from gossamer.launch.gantt import Activity
    from rich.console import Console, RenderableType
    from rich.text import Text

WINDOW_S, MIN_STEPS, REFRESH_S = 30.0, 3, 0.5
"""What is kept: the last seconds, and at least so many steps."""
BAR_CELLS = 28
SILENCE_S = 60.0
"""A run that writes nothing for longer is told of in red."""


class Window:
    """The last events of the last attempt."""

    def __init__(self) -> None:
        self._start: Event | None = None
        self._events: deque[Event] = deque()
        self._steps_s: deque[float] = deque(maxlen=MIN_STEPS)

    def take(self, event: Event) -> None:
        """Takes one event in and lets go of what is too old."""
        if event["event"] == "run_start":
            self._start = event
            self._events.clear()
        if event["event"] == "train_step":
            self._steps_s.append(event["time_s"] - event.get("step_s", 0.0))
        self._events.append(event)
        first_s = min([event["time_s"] - WINDOW_S, *list(self._steps_s)[:1]])
        while self._events[0]["time_s"] < first_s:
            self._events.popleft()

    def activities(self) -> list[Activity]:
        """What trainer and engines did; nothing outside of RL."""
        from gossamer.launch.gantt import activities

        return activities([self._start, *self._events]) if self._start else []

    def rates(self) -> dict[str, float]:
        """Tokens a second that each engine sampled while it sampled."""
        found: dict[str, tuple[float, float]] = {}
        for e in of_kind(list(self._events), "engine", what="generate"):
            tokens, spent_s = found.get(e["engine"], (0.0, 0.0))
            found[e["engine"]] = (tokens + e["tokens"], spent_s + e["generate_s"])
        return {engine: tokens / max(s, 1e-9) for engine, (tokens, s) in found.items()}


def share_bar(share: dict[str, float]) -> Text:
    """One cell for each 1 / BAR_CELLS of the time, in the colours of the report."""
    from gossamer.launch.gantt import COLORS
    from rich.text import Text

    bar, filled, total = Text(), 0, 0.0
    for what, color in COLORS.items():
        total += share.get(what, 0.0)
        cells = round(total * BAR_CELLS) - filled
        filled += cells
        bar.append("█" * cells, color)
    return bar


def where_time_went(window: Window) -> RenderableType | None:
    """A row for the trainer and each engine; None where nobody did anything yet."""
    from gossamer.launch.gantt import BESIDE, COLORS, shares
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found, rates = window.activities(), window.rates()
    if not found:
        return None
    table = Table.grid(padding=(0, 2))
    for who in ["trainer", *sorted({a.who for a in found} - {"trainer"})]:
        share = shares(found, who)
        rate = f"{format_count(rates[who])} tokens/s" if who in rates else ""
        waits = f"{100 * share.get('waiting', 0.0):3.0f} % waiting"
        table.add_row(Text(who, "dim"), share_bar(share), Text(waits), Text(rate, "dim"))
    legend = Text()
    for what, color in COLORS.items():
        if what != BESIDE:
            legend.append("█ ", color).append(f"{what}  ")
    seconds = max(a.stop_s for a in found) - min(a.start_s for a in found)
    return Group(Text(f"the last {seconds:.0f} s", "dim"), table, legend)


class RunTop:
    """One run: its panel, and who waited."""

    def __init__(self, run_dir: Path, console: Console) -> None:
        from rich.live import Live

        self._tail, self.state, self._window = EventTail(run_dir), RunState(), Window()
        self._live = Live(console=console, auto_refresh=False)
        self._console = console

    def start(self) -> None:
        if self._console.is_terminal:
            self._live.start()
        self.refresh()

    def refresh(self) -> None:
        for event in self._tail.read():
            self.state.take(event)
            self._window.take(event)
        if self._console.is_terminal:
            self._live.update(self.shown(), refresh=True)

    def shown(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.text import Text

        shown: list[RenderableType] = [self.state.panel(time.time())]
        silent_s = time.time() - self.state.last_s
        if self.state.last_s and self.state.ended is None and silent_s > SILENCE_S:
            told = f"no event for {format_duration(silent_s)}: stalled, or killed"
            shown.append(Padding(Text(told, "bold red"), (0, 3)))
        if (below := where_time_went(self._window)) is not None:
            shown.append(Padding(below, (0, 3)))
        return Group(*shown)

    def stop(self) -> None:
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._console.print(self.shown())


@dataclass(slots=True)
class _Seen:
    """A replica, as its run's folder tells."""

    name: str
    run_dir: Path
    state: str = "running"
    restarts: int = 0
    started_s: float = 0.0


class FleetTop:
    """A run of several replicas: the display of the run itself."""

    def __init__(self, run_dir: Path, console: Console) -> None:
        from gossamer.launch.recipe import load_recipe
        from gossamer.launch.replicas_display import FleetDisplay
        from gossamer.launch.replicas_members import open_rounds, rounds_url

        config = load_recipe(str(run_dir / "config.json"), [])
        url = rounds_url(config.train.outer, run_dir) if config.train.outer else ""
        self.state, self._tail = RunState(), EventTail(run_dir)
        self._members = {p.name: _Seen(p.name, p) for p in sorted(run_dir.glob("replica-*/"))}
        members, store = list(self._members.values()), open_rounds(config, run_dir)
        self._display = FleetDisplay(run_dir, members, store, url, "", console)

    def start(self) -> None:
        self.refresh()
        self._display.start()

    def refresh(self) -> None:
        for event in self._tail.read():
            self.state.take(event)
            if event["event"] == "replica" and (seen := self._members.get(event["replica"])):
                is_start = event["what"] in ("started", "restarted")
                seen.state = "running" if is_start else event["what"]
                seen.started_s = event["time_s"] if is_start else seen.started_s
        self._display.refresh()

    def stop(self) -> None:
        self._display.stop()


def add_top_command(command: argparse.ArgumentParser) -> None:
    """Options of `gossamer top`; nothing heavy is imported."""
    command.add_argument("run_dir", metavar="RUN_DIR", help="its folder, or s3://, ...")
    command.add_argument("--once", action="store_true", help="print how it stands, and end")
    command.set_defaults(run=run_top)


def run_top(arguments: argparse.Namespace) -> None:
    """Shows the run until it ends, or until Ctrl-C."""
    from gossamer.launch.replicas_summary import is_fleet
    from rich.console import Console

    run_dir = open_here(arguments.run_dir)
    if not has_events(run_dir):
        raise ValueError(
            f"{where_of(run_dir)} holds no metrics; expected the folder of a run"
            " (one that was submitted is found by `gossamer status`)"
        )
    top = (FleetTop if is_fleet(run_dir) else RunTop)(run_dir, Console())
    top.start()
    try:
        while top.state.ended is None and not arguments.once:
            time.sleep(REFRESH_S)
            top.refresh()
    except KeyboardInterrupt:
        pass
    finally:
        top.stop()
