"""A run as it goes, in the terminal: a panel that redraws, or one plain line now and then.

The one idea: the display is a reader of metrics.jsonl like any other. It holds no handle on the
run, so it may start late, be killed, or watch a run on another machine through a shared folder.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.launch.quantities import (
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
)
from gossamer.launch.summary import Event, parse_event
from gossamer.trainer.event_store import LiveTail
from gossamer.trainer.run_folder import url_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_EVERY_S = 10.0
"""Without a terminal, a line is printed this often, and at each phase change and eval."""
DEAD, DRAINED, STARTING = "dead", "drained", "starting"


class EventTail:
    """Reads what was appended to metrics.jsonl since the last look; only whole lines."""

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self._offset = 0
        self._store = LiveTail(url) if (url := url_of(Path(run_dir))) is not None else None

    def read(self, to_end: bool = False) -> list[Event]:
        """New events; a line that is no event is passed over, for a display must not end a run.

        `to_end`: also those of the last second, where they lie in a store.
        """
        events = []
        for line in self._lines(to_end):
            try:
                events.append(parse_event(line, str(self.path)))
            except ValueError:
                continue
        return events

    def _lines(self, to_end: bool) -> list[bytes]:
        if self._store is not None:
            return self._store.read_to_end() if to_end else self._store.read()
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.split(b"\n")


class RunState:
    """What the display shows, brought up to date event by event."""

    def __init__(self) -> None:
        self.name = ""
        self.started_s: float | None = None
        self.last_s = 0.0
        self.ended: str | None = None
        self.attempts = 0
        self.totals: dict[str, int] = {}
        self.phase = ""
        self.first_step: dict[str, int] = {}
        self.step: Event = {}
        self.evals: dict[str, float] = {}
        self.heldout_loss: float | None = None
        self.published: Event = {}
        self.wire_bytes = self.full_bytes = 0
        self.engines: dict[str, str] = {}
        self.lost = 0
        self.news: list[str] = []

    def take(self, event: Event) -> bool:
        """Takes one event in; True when it deserves a line of its own (phase change, eval, end)."""
        self.last_s = event["time_s"]
        match event["event"]:
            case "run_start":
                self._start(event)
            case "phase":
                is_new, self.phase = event["phase"] != self.phase, event["phase"]
                return is_new
            case "train_step":
                is_new, self.phase = event["phase"] != self.phase, event["phase"]
                first = self.first_step.setdefault(self.phase, event["step"])
                self.first_step[self.phase] = min(first, event["step"])
                self.step = event
                return is_new
            case "publish":
                self.published = event
                self.wire_bytes += event["frame_bytes"]
                self.full_bytes += event["full_bytes"]
            case "pools":  # made anew, with engines of its own
                self.engines = {}
            case "engine" if event["what"] == "waits":
                self.engines[event["engine"]] = f"waits for {event['waits_for']}"
            case "engine":
                self._hear(event["engine"], event["what"], event.get("version"))
            case "eval":
                if "exact_match" in event:
                    self.evals[event["name"]] = event["exact_match"]
                else:
                    self.heldout_loss = event.get("loss")
                return True
            case "lifecycle":
                if event["why"]:
                    self.news = [event["why"]]
                return bool(event["why"])
            case "checkpoint_torn":
                self.news.append(f"resumed from an earlier checkpoint, for {event['reason']}")
                return True
            case "run_end":
                self.ended = str(event.get("reason", "ended"))
                return True
        return False

    def _start(self, event: Event) -> None:
        self.name, self.ended = str(event["name"]), None
        self.started_s = event["time_s"] if self.started_s is None else self.started_s
        self.attempts += 1
        self.news = []
        named = [p for p in event.get("phases") or [] if isinstance(p, dict)]
        self.totals = {p["name"]: p["max_steps"] for p in named if "max_steps" in p}

    def _hear(self, engine: str, what: str, version: int | None) -> None:
        if what == "dead":
            self.engines[engine], self.lost = DEAD, self.lost + 1
        elif what == "drained":
            self.engines[engine] = DRAINED
        elif what == "left":
            self.engines.pop(engine, None)
        elif version is not None:
            self.engines[engine] = f"v{version}"
        elif what in ("start", "replaced", "reseeded"):
            gone = {"replaced": DEAD, "reseeded": DRAINED}.get(what)
            self.engines = {name: held for name, held in self.engines.items() if held != gone}
            self.engines[engine] = STARTING

    @property
    def steps(self) -> tuple[int, int | None]:
        """Steps done in this phase, and how many it has at most (None: unknown)."""
        begun = self.step.get("phase") == self.phase != ""
        counted = self.step["step"] - self.first_step[self.phase] + 1 if begun else 0
        # a replica that joined began in the middle
        done = self.step.get("phase_step", counted) if begun else 0
        return done, self.totals.get(self.phase)

    def elapsed_s(self, now_s: float) -> float | None:
        """Since the first run_start; stands still once the run has ended."""
        if self.started_s is None:
            return None
        return (self.last_s if self.ended else max(now_s, self.last_s)) - self.started_s

    def learning(self) -> dict[str, str]:
        """What the trainer measures, as words; what was not measured is left out."""
        step = self.step
        has_wait = step.get("step_s") and step.get("wait_s") is not None
        return known(
            {
                "loss": format_number(step.get("loss")),
                "held-out loss": format_number(self.heldout_loss),
                "reward": format_number(step.get("reward_mean"), 3),
                **{f"{name} match": format_percent(m) for name, m in self.evals.items()},
                "tokens/s": format_count(step.get("tokens_per_s")),
                "MFU": format_percent(step.get("mfu")),
                "waiting": format_percent(step["wait_s"] / step["step_s"] if has_wait else None),
            }
        )

    def weights(self) -> dict[str, str]:
        """Who holds which version, and what that cost on the wire."""
        last = self.published
        if not last:  # what the start waits for, if anything
            return {name: held for name, held in self.engines.items() if " " in held}
        sent, full = format_bytes(last["frame_bytes"]), format_bytes(last["full_bytes"])
        times = f" ({self.full_bytes / self.wire_bytes:.3g}× less)" if self.wire_bytes else ""
        return known(
            {
                "trainer": f"v{last['version']}",
                **dict(sorted(self.engines.items())),
                "engines lost": str(self.lost) if self.lost else MISSING,
                "changed": format_percent(last["density"] if last["kind"] == "delta" else None),
                "sent": f"{sent} of {full}",
                "sent in all": format_bytes(self.wire_bytes) + times,
            }
        )

    def line(self) -> str:
        """The run in one line, as of its last event."""
        done, total = self.steps
        facts = self.learning() | self.weights()
        parts = [
            f"[{format_duration(self.elapsed_s(self.last_s))}]",
            f"{self.phase or 'starting'} {done}" + (f"/{total}" if total else ""),
            *self.news,
            *(f"{name} {words}" for name, words in facts.items()),
            *([f"ended: {self.ended}"] if self.ended else []),
        ]
        return "  ".join(parts)

    def panel(self, now_s: float) -> RenderableType:
        """The run as a panel."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done, total = self.steps
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=total, completed=done) if total else Text()
        of = f"step {done:,} of {total:,}" if total else f"step {done:,}"
        head.add_row(Text(self.phase or "starting", "bold"), bar, Text(of))
        body, sides = Table.grid(padding=(0, 2), expand=True), []
        for facts in (self.learning(), self.weights()):
            side = Table.grid(padding=(0, 2))
            side.add_column(style="dim", no_wrap=True)
            for name, words in facts.items():
                side.add_row(name, Text(words, "bold red" if words == DEAD else ""))
            body.add_column(ratio=1)
            sides.append(side)
        body.add_row(*sides)
        title = Text.assemble("gossamer · ", (self.name or "waiting for the run to start", "bold"))
        below = [format_duration(self.elapsed_s(now_s))]
        below += [f"attempt {self.attempts}"] if self.attempts > 1 else []
        below += [f"ended: {self.ended}"] if self.ended else []
        told = [Text(fault, "bold red") for fault in self.news]
        has_body = self.phase or self.weights()
        content = Group(head, *told, Text(), body) if has_body else Group(head, *told)
        return Panel(content, title=title, subtitle=Text(" · ".join(below)), padding=(1, 2))


def known(facts: dict[str, str]) -> dict[str, str]:
    """Without the facts that were not measured."""
    return {name: words for name, words in facts.items() if words != MISSING}


class LiveDisplay:
    """Shows the run in RUN_DIR: redrawn at each `refresh` in a terminal, plain lines elsewhere."""

    def __init__(self, run_dir: Path, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = console or Console()
        self._tail, self._state = EventTail(run_dir), RunState()
        self._live = Live(console=self._console, auto_refresh=False)
        self._printed_s = time.monotonic()
        self._has_news = False

    def start(self) -> None:
        if self._console.is_terminal:
            self._live.start()
        self.refresh()

    def refresh(self, to_end: bool = False) -> None:
        """Reads new lines and shows them. Cheap: call it a few times a second."""
        for event in self._tail.read(to_end):
            self._has_news = True
            if self._state.take(event) and not self._console.is_terminal:
                self._print()
        if self._console.is_terminal:
            self._live.update(self._state.panel(time.time()), refresh=True)
        elif self._has_news and time.monotonic() - self._printed_s >= PLAIN_EVERY_S:
            self._print()

    def stop(self) -> None:
        """A last look at the file; the panel stays on the screen as it was."""
        self.refresh(to_end=True)
        if self._console.is_terminal:
            self._live.stop()
        elif self._has_news:
            self._print()

    def _print(self) -> None:
        self._console.print(self._state.line(), markup=False, highlight=False, soft_wrap=True)
        self._printed_s, self._has_news = time.monotonic(), False
