"""Who waited for whom: a Gantt chart of trainer, log and engines, and each one's time in shares.

The one idea: events say when something ended and how long it took, so what everybody did can be
put together afterwards, and where nothing is, somebody waited. Nothing extra is measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import plotly.graph_objects as go
from gossamer.launch.charts import BLUE, GREEN, ORANGE, TEAL, Chart, styled
from gossamer.launch.quantities import format_percent
from gossamer.launch.summary import Event, attempt_starts, mean, of_kind, rl_phases
from gossamer.launch.timeline import Clock
from plotly.subplots import make_subplots

COLORS = {
    "rollout": TEAL,
    "score": "#7048e8",
    "train": BLUE,
    "encode": ORANGE,
    "wire": "#f2c037",
    "fetch and check": "#8fd3b6",
    "apply": GREEN,
    "waiting": "#f3c5d0",
}
"""The order is that of a weight update; "encode" is to gather, find changes, code and sign."""
BESIDE = "fetch and check"
"""Runs beside sampling, on a lane of its own, so it takes nobody's time."""
DRAWN_STEPS, SHOWN_STEPS = 200, 10
"""Steps that the page holds, and those that it opens on."""
MAX_ENGINES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What somebody did from start_s to stop_s (unix)."""

    who: str
    what: str
    start_s: float
    stop_s: float
    label: str = ""

    @property
    def length_s(self) -> float:
        return self.stop_s - self.start_s


def activities(events: list[Event]) -> list[Activity]:
    """What trainer and engines did, and their waits, in RL steps of the last attempt."""
    events = events[attempt_starts(events)[-1] :]
    rl = rl_phases(events)
    steps = [e for e in of_kind(events, "train_step") if e["phase"] in rl and e.get("step_s")]
    steps = steps[-DRAWN_STEPS:]
    if not steps:
        return []
    first_s, last_s = steps[0]["time_s"] - steps[0]["step_s"], steps[-1]["time_s"]
    done = [a for e in of_kind(events, "engine") for a in _of_engine(e)]
    done = [a for a in done if first_s <= a.start_s and a.stop_s <= last_s]
    found = [*done, *_of_trainer(steps, of_kind(events, "publish"), done)]
    for engine in sorted({a.who for a in done}):
        found += _gaps(engine, [a for a in done if a.who == engine], first_s, last_s)
    return found


def _of_engine(event: Event) -> Iterable[Activity]:
    who, end_s, version = event["engine"], event["time_s"], event.get("version")
    if event["what"] == "generate":
        start_s, label = end_s - event["generate_s"], f"{event['samples']} samples, v{version}"
        yield Activity(who=who, what="rollout", start_s=start_s, stop_s=end_s, label=label)
    elif event["what"] == "commit" and "pause_s" in event:
        start_s, label = end_s - event["pause_s"], f"v{version}"
        yield Activity(who=who, what="apply", start_s=start_s, stop_s=end_s, label=label)
        stop_s = end_s - event.get("commit_s", event["pause_s"])  # it waits for a gap in sampling
        start_s = stop_s - event["stage_s"]
        yield Activity(who=who, what=BESIDE, start_s=start_s, stop_s=stop_s, label=label)


def _of_trainer(
    steps: list[Event], publishes: list[Event], done: list[Activity]
) -> Iterable[Activity]:
    """A step: wait for samples, score them, train, then publish; one after the other.

    Where prompts were asked again after scores (rl.refill_rounds), both are drawn as if once.
    """
    ends = sorted((a.stop_s, a.who) for a in done if a.what == "rollout")
    published = {e["step"]: e for e in publishes}
    for step in steps:
        now_s, end_s = step["time_s"] - step["step_s"], step["time_s"]
        drawn_s, score_s = step.get("wait_s", 0.0), step.get("score_s", 0.0)
        parts = [("waiting", drawn_s - score_s), ("score", score_s)]
        publish = published.get(step["step"])
        if publish and now_s < publish["time_s"] <= end_s:
            coding_s = sum(publish.get(key, 0.0) for key in ("export_s", "find_s", "encode_s"))
            wire_s = publish.get("put_s", 0.0) + publish.get("wait_s", 0.0)
            train_s = publish["time_s"] - coding_s - wire_s - now_s - drawn_s
            parts += [("train", train_s), ("encode", coding_s), ("wire", wire_s)]
        else:
            parts += [("train", end_s - now_s - drawn_s)]
        for what, length_s in parts:
            label = f"step {step['step']}"
            if what == "waiting" and (last := bisect_right(ends, (now_s + length_s, "~"))):
                label += f", for {ends[last - 1][1]}"
            if length_s > 0:
                yield Activity(
                    who="trainer", what=what, start_s=now_s, stop_s=now_s + length_s, label=label
                )
            now_s += length_s


def _gaps(who: str, done: list[Activity], first_s: float, last_s: float) -> Iterable[Activity]:
    """Where an engine neither sampled nor applied."""
    busy = sorted((a.start_s, a.stop_s) for a in done if a.what != BESIDE)
    end_s = first_s
    for (start_s, stop_s), _ in pairwise([*busy, (last_s, last_s), (last_s, last_s)]):
        if start_s > end_s:
            label = "for work, or for the version that it may be done with"
            yield Activity(who=who, what="waiting", start_s=end_s, stop_s=start_s, label=label)
        end_s = max(end_s, stop_s)


def shares(found: list[Activity], who: str) -> dict[str, float]:
    """Of the time from the first to the last that `who` did, by activity; what runs beside is left
    out. The rest to 1 is the trainer's bookkeeping: checkpoints, evaluations, what it writes."""
    own = [a for a in found if a.who == who and a.what != BESIDE]
    total_s = max(a.stop_s for a in own) - min(a.start_s for a in own)
    spent = {what: sum(a.length_s for a in own if a.what == what) for what in COLORS}
    if who != "trainer":  # a version may be applied between two tokens of a rollout
        spent["rollout"] = total_s - spent["apply"] - spent["waiting"]
    return {what: length_s / total_s for what, length_s in spent.items() if length_s}


def gantt_chart(events: list[Event]) -> Chart:
    """Left: who did what when, opened on a few steps; right: each one's time in shares."""
    title, found = "Who waited for whom", activities(events)
    engines = sorted({a.who for a in found} - {"trainer"}, key=lambda name: (len(name), name))
    if not engines:
        return Chart(key="gantt", title=title, note="No engine sampled for this run.")
    idle = mean([shares(found, engine).get("waiting", 0.0) for engine in engines])
    waited = shares(found, "trainer").get("waiting", 0.0)
    rows = ["trainer", *engines[:MAX_ENGINES]]
    clock = Clock(zero_s=Clock.of(events).zero_s, unit_s=1, unit="s")  # steps are short
    figure = make_subplots(cols=2, column_widths=[0.8, 0.2], horizontal_spacing=0.03)
    for what, color in COLORS.items():
        own = [a for a in found if a.what == what and a.who in rows]
        figure.add_trace(_bars(own, what, color, rows, clock), row=1, col=1)
        share = [100 * shares(found, who).get(what, 0.0) for who in rows]
        if what != BESIDE:
            bar = go.Bar(orientation="h", x=share, y=list(range(len(rows))), width=0.7)
            bar.update(marker={"color": color, "line": {"width": 0}}, name=what, showlegend=False)
            bar.update(hovertemplate="%{x:.3g} %")
            figure.add_trace(bar, row=1, col=2)
    styled(figure, 130 + 46 * len(rows))
    span = [len(rows) - 0.5, -0.5]
    names = [f"{who} " for who in rows]
    figure.update_yaxes(range=span, tickvals=list(range(len(rows))), ticktext=names, col=1)
    figure.update_yaxes(range=span, showticklabels=False, col=2, matches="y")
    figure.update_xaxes(title=clock.title, range=_window(found, clock), row=1, col=1)
    figure.update_xaxes(title="share of the time (%)", range=[0, 100], row=1, col=2)
    figure.update_layout(barmode="stack", margin={"l": 76}, legend_traceorder="normal")
    steps = sum(a.what == "train" for a in found)
    opened = f"{SHOWN_STEPS} of {steps} RL steps" if steps > SHOWN_STEPS else "RL steps"
    note = (
        f"Left: {opened}; double-click for all, drag to zoom, hover "
        "for whom a wait was. A new version is fetched and checked beside sampling (lower lane);"
        " blank is bookkeeping."
        f" Right: over all steps drawn. The trainer waited {format_percent(waited)} of its time, "
        f"engines {format_percent(idle)} of theirs."
    )
    if len(engines) > MAX_ENGINES:
        note += f" The first {MAX_ENGINES} of {len(engines)} engines are drawn."
    return Chart(key="gantt", title=title, note=note, figure=figure, wide=True)


def _bars(own: list[Activity], what: str, color: str, rows: list[str], clock: Clock) -> go.Bar:
    lower = what == BESIDE
    return go.Bar(
        orientation="h",
        # sampling above, what runs beside it below; the trainer has one lane
        y=[
            rows.index(a.who) + (0.28 if lower else -0.08 if a.who != "trainer" else 0) for a in own
        ],
        base=[clock.at(a.start_s) for a in own],
        x=[a.length_s / clock.unit_s for a in own],
        width=[0.16 if lower else 0.5 if a.who != "trainer" else 0.66 for a in own],
        customdata=[f"{a.label}, {a.length_s:.3g} s" for a in own],
        hovertemplate=f"{what}: %{{customdata}}<extra></extra>",
        marker={"color": color, "line": {"width": 0}},
        name=what,
    )


def _window(found: list[Activity], clock: Clock) -> list[float]:
    """Time axis of the steps that the chart opens on."""
    ends = [a.stop_s for a in found if a.what == "train"]
    first = max(0, (len(ends) - SHOWN_STEPS) // 2)
    begin_s = ends[first - 1] if first else min(a.start_s for a in found)
    return [clock.at(begin_s), clock.at(ends[min(first + SHOWN_STEPS, len(ends)) - 1])]
