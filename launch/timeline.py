"""The charts over wall-clock time: who held which weights when, pauses, throughput.

The one idea: a kill, a lost engine and a slow commit all show as gaps, so these charts read every
event in the order it happened, the steps a later attempt did again included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import plotly.graph_objects as go
from gossamer.launch.charts import (
    BLUE,
    ENGINE_COLORS,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    RED,
    Chart,
    dots,
    styled,
    words,
)
from gossamer.launch.summary import Event, attempt_starts, mean, of_kind, rl_phases
from plotly.subplots import make_subplots


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """Turns unix times into time since the first run_start, in a unit that suits the run."""

    zero_s: float
    unit_s: float
    unit: str

    @classmethod
    def of(cls, events: list[Event]) -> Clock:
        zero_s = of_kind(events, "run_start")[0]["time_s"]
        wall_s = events[-1]["time_s"] - zero_s
        unit_s, unit = next(
            u for u in ((1, "s"), (60, "min"), (3600, "h")) if wall_s <= 300 * u[0] or u[1] == "h"
        )
        return cls(zero_s=zero_s, unit_s=unit_s, unit=unit)

    def at(self, time_s: float) -> float:
        return (time_s - self.zero_s) / self.unit_s

    @property
    def title(self) -> str:
        return f"time since the start ({self.unit})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stretch of time on one row of the timeline, in unix seconds."""

    start_s: float
    stop_s: float
    label: str
    tint: int


def held_versions(events: list[Event], engine: str) -> list[Span]:
    """Which version the engine held when: from its commit to the next one, its death, or the last
    event of the attempt."""
    spans: list[Span] = []
    bounds = [0, *attempt_starts(events), len(events)]
    for first, stop in pairwise(bounds):
        end = {"time_s": events[stop - 1]["time_s"], "version": None}
        own = of_kind(events[first:stop], "engine", engine=engine)
        own = [e for e in own if e["what"] != "generate"]
        for event, after in pairwise([*own, end]):
            if event["what"] != "dead" and event.get("version") is not None:
                spans.append(
                    Span(
                        start_s=event["time_s"],
                        stop_s=after["time_s"],
                        label=f"v{event['version']}",
                        tint=event["version"] % 2,
                    )
                )
    return spans


def phase_spans(events: list[Event]) -> list[Span]:
    """Stretches of train steps of one phase within one attempt."""
    spans: list[Span] = []
    rl, phase = rl_phases(events), None
    for event in events:
        if event["event"] == "run_start":
            phase = None
        if event["event"] != "train_step":
            continue
        start_s = event["time_s"] - event.get("step_s", 0.0)
        if event["phase"] == phase:
            start_s = spans.pop().start_s
        phase = event["phase"]
        tint = int(phase in rl)
        spans.append(Span(start_s=start_s, stop_s=event["time_s"], label=words(phase), tint=tint))
    return spans


def bars(spans: list[Span], row: str, clock: Clock, tints: tuple[str, str], unit: str) -> go.Bar:
    return go.Bar(
        orientation="h",
        y=[row] * len(spans),
        base=[clock.at(s.start_s) for s in spans],
        x=[(s.stop_s - s.start_s) / clock.unit_s for s in spans],
        text=[s.label for s in spans],
        textposition="inside",
        insidetextanchor="start",
        textfont={"color": INK},
        marker={"color": [tints[s.tint] for s in spans], "line": {"width": 0}},
        width=0.55,
        showlegend=False,
        hovertemplate=f"{row}: %{{text}}, from %{{base:.4g}} for %{{x:.3g}} {unit}<extra></extra>",
    )


def timeline_chart(events: list[Event]) -> Chart:
    """Rows: trainer (phases), checkpoints, weight log (versions), one per engine."""
    title, clock = "Timeline", Clock.of(events)
    engines = sorted({e["engine"] for e in of_kind(events, "engine")})
    phases, versions = phase_spans(events), of_kind(events, "publish")
    if not phases and not versions:
        note = "Nothing was trained or published yet."
        return Chart(key="timeline", title=title, note=note, wide=True)
    figure = go.Figure(bars(phases, "trainer", clock, ("#e4e7eb", "#d0d9fb"), clock.unit))
    for number, engine in enumerate(engines):
        color = ENGINE_COLORS[number % len(ENGINE_COLORS)]
        tints = (f"{color}66", f"{color}33")
        figure.add_trace(bars(held_versions(events, engine), engine, clock, tints, clock.unit))

    def mark(found: list[Event], name: str, row: str | None, color: str, symbol: str) -> None:
        if found:
            x = [clock.at(e["time_s"]) for e in found]
            y = [row or e["engine"] for e in found]
            text = [mark_text(e) for e in found]
            trace = dots(x, y, name, color, symbol, 9, text=text, hovertemplate="%{text}")
            figure.add_trace(trace.update(marker_line={"width": 1.5, "color": color}))

    mark(of_kind(versions, "publish", kind="delta"), "delta", "weight log", BLUE, "line-ns")
    mark(of_kind(versions, "publish", kind="anchor"), "anchor", "weight log", ORANGE, "diamond")
    mark(of_kind(events, "checkpoint"), "checkpoint", "checkpoints", INK, "square-open")
    mark(of_kind(events, "audit", equal=True), "audit: equal", None, GREEN, "circle-open")
    mark(of_kind(events, "audit", equal=False), "audit: NOT equal", None, RED, "star")
    mark(of_kind(events, "engine", what="dead"), "engine dead", None, RED, "x")
    mark(of_kind(events, "engine", what="replaced"), "replacement", None, GREEN, "triangle-right")
    for number, start in enumerate(of_kind(events, "run_start")[1:], 2):
        figure.add_vline(
            clock.at(start["time_s"]),
            line={"color": MUTED, "dash": "dot"},
            annotation={"text": f"attempt {number}", "font": {"color": MUTED}},
            annotation_position="bottom right",
        )
    kept = ["checkpoints"] if of_kind(events, "checkpoint") else []
    rows = [*reversed(engines), "weight log", *kept, "trainer"]
    styled(figure, 130 + 44 * len(rows))
    figure.update_yaxes(categoryorder="array", categoryarray=rows)
    figure.update_yaxes(range=[-0.85, len(rows) - 0.5])
    figure.update_xaxes(title=clock.title)
    figure.update_layout(barmode="overlay", uniformtext={"minsize": 9, "mode": "hide"})
    note = (
        "When each version was committed to the log, and which version each engine held; an "
        "engine's colour changes at each commit. Zoom in by dragging, hover for times."
    )
    return Chart(key="timeline", title=title, note=note, figure=figure, wide=True)


def mark_text(event: Event) -> str:
    """What the mark's hover says."""
    match event["event"]:
        case "publish":
            return f"version {event['version']} ({event['kind']}), {event['frame_bytes']:,} bytes"
        case "checkpoint":
            return f"checkpoint at step {event['step']}"
        case "audit":
            return f"{event['engine']} audited at version {event['version']}"
        case _:
            return f"{event['engine']} {event['what']}"


def pause_chart(events: list[Event]) -> Chart:
    """Per engine and version: pause of the commit, and delay from publish to commit."""
    title = "Commits"
    commits = [e for e in of_kind(events, "engine", what="commit") if "pause_s" in e]
    if not commits:
        return Chart(key="pauses", title=title, note="No engine committed a version.")
    published = {e["version"]: e["time_s"] for e in of_kind(events, "publish")}
    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    for number, engine in enumerate(sorted({e["engine"] for e in commits})):
        own = of_kind(commits, "engine", engine=engine)
        color = ENGINE_COLORS[number % len(ENGINE_COLORS)]
        x = [e["version"] for e in own]
        pause_ms = [1000 * e["pause_s"] for e in own]
        delay_s = [
            e["time_s"] - published[e["version"]] if e["version"] in published else None
            for e in own
        ]
        figure.add_trace(dots(x, pause_ms, engine, color, size=6), row=1, col=1)
        figure.add_trace(dots(x, delay_s, engine, color, size=6, showlegend=False), row=1, col=2)
    styled(figure, 280)
    figure.update_xaxes(title="weight version")
    figure.update_yaxes(title="pause of the commit (ms)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="from publish to commit (s)", rangemode="tozero", row=1, col=2)
    average = mean([1000 * e["pause_s"] for e in commits])
    note = (
        f"Left: how long an engine stood still to take a version, on average "
        f"{average or 0:.3g} ms. "
        "Right: how long after the version was in the log; fetching, decoding and checking run "
        "beside the engine."
    )
    return Chart(key="pauses", title=title, note=note, figure=figure, wide=True)


def throughput_chart(events: list[Event]) -> Chart:
    title, clock = "Throughput", Clock.of(events)
    steps = [e for e in of_kind(events, "train_step") if e.get("tokens_per_s") is not None]
    if not steps:
        return Chart(key="throughput", title=title, note="No step recorded its throughput.")
    rl = rl_phases(events)
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.1)
    for phase in dict.fromkeys(e["phase"] for e in steps):
        own = of_kind(steps, "train_step", phase=phase)
        x = [clock.at(e["time_s"]) for e in own]
        share = [100 * e.get("wait_s", 0.0) / e["step_s"] if e.get("step_s") else None for e in own]
        color = BLUE if phase in rl else MUTED
        tokens_per_s = [e["tokens_per_s"] for e in own]
        figure.add_trace(dots(x, tokens_per_s, words(phase), color, size=4), row=1, col=1)
        waiting = dots(x, share, words(phase), color, size=4, showlegend=False)
        figure.add_trace(waiting, row=2, col=1)
    styled(figure)
    figure.update_xaxes(title=clock.title, row=2, col=1)
    figure.update_yaxes(title="tokens/s", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="waiting (%)", rangemode="tozero", row=2, col=1)
    note = (
        "One dot a step: tokens trained per second, and the share of the step spent waiting for "
        "samples, a publish in flight or data."
    )
    return Chart(key="throughput", title=title, note=note, figure=figure)
