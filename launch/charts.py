"""The charts of a run's report, each made from the events of metrics.jsonl.

The one idea: a chart is a title, a sentence that says what is to be seen, and a figure; when the
run holds nothing to draw, the sentence stands alone. Curves of learning are drawn from settled
events (a step that was done again counts once); bytes and times from all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import plotly.graph_objects as go
from gossamer.launch.quantities import format_bytes, format_number, format_percent
from gossamer.launch.summary import Event, mean, of_kind, rl_evals, rl_phases
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

INK, MUTED, GRID = "#1f2933", "#7b8794", "#eceff3"
BLUE, ORANGE, TEAL, RED, GREEN = "#3b5bdb", "#e8890c", "#0c8599", "#d6336c", "#2f9e44"
PALE_BLUE = "#a5b8f3"
ENGINE_COLORS = (TEAL, "#7048e8", "#e8590c", "#5c940d", "#1971c2", "#c2255c")
LOAD_STEPS = 10
"""The expert heat map is a mean over this many last steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One panel of the report; `figure` is None when there is nothing to draw."""

    key: str
    title: str
    note: str
    figure: go.Figure | None = None
    wide: bool = False


def styled(figure: go.Figure, height: int = 300, legend: bool = True) -> go.Figure:
    """The report's look: white, thin grid, legend above the plot."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 64, "r": 16, "t": 34, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"bgcolor": "white"},
        hovermode="closest",
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor="#cbd2d9", ticks="outside")
    figure.update_yaxes(gridcolor=GRID, zeroline=False, title_standoff=8)
    return figure


def line(x: list, y: list, name: str, color: str, **more: object) -> go.Scatter:
    mode = "lines" if len(x) > 1 else "markers"
    return go.Scatter(x=x, y=y, name=name, mode=mode, line={"color": color, "width": 2}, **more)


def dots(
    x: list, y: list, name: str, color: str, symbol: str = "circle", size: int = 7, **more: object
) -> go.Scatter:
    marker = {"color": color, "symbol": symbol, "size": size}
    return go.Scatter(x=x, y=y, name=name, mode="markers", marker=marker, **more)


def column(events: Iterable[Event], field: str, scale: float = 1.0) -> list[float | None]:
    return [None if e.get(field) is None else e[field] * scale for e in events]


def words(phase: str) -> str:
    return {"rl": "RL", "pretrain": "pre-training"}.get(phase, phase.replace("_", " "))


def loss_chart(settled: list[Event]) -> Chart:
    steps = of_kind(settled, "train_step")
    if not steps:
        return Chart(key="loss", title="Loss", note="No train step was recorded.")
    rl, phases = rl_phases(settled), list(dict.fromkeys(e["phase"] for e in steps))
    figure = make_subplots(cols=len(phases), horizontal_spacing=0.2)
    for col, phase in enumerate(phases, 1):
        own = of_kind(steps, "train_step", phase=phase)
        curve = line(column(own, "step"), column(own, "loss"), words(phase), BLUE)
        figure.add_trace(curve, row=1, col=col)
        evals = of_kind(settled, "eval", name="text", phase=phase)
        if evals:
            held = line(column(evals, "step"), column(evals, "loss"), "held out", ORANGE)
            figure.add_trace(held.update(mode="lines+markers"), row=1, col=col)
        unit = "policy loss" if phase in rl else "cross-entropy (nats per token)"
        figure.update_yaxes(title=unit, row=1, col=col)
        figure.update_xaxes(title=f"train step ({words(phase)})", row=1, col=col)
    note = "Each phase on its own axes; the losses of two phases are not comparable."
    if len(phases) == 1:
        note = f"Over the steps of {words(phases[0])}."
    evals = of_kind(settled, "eval", name="text")
    if evals:
        note += (
            f" Orange: the loss over {evals[-1]['tokens']} tokens of documents never trained on,"
            f" {format_number(evals[-1]['loss'])} at the end."
        )
    return Chart(key="loss", title="Loss", note=note, figure=styled(figure, legend=False))


def reward_chart(settled: list[Event]) -> Chart:
    steps = [e for e in of_kind(settled, "train_step") if e.get("reward_mean") is not None]
    heldout, dev = rl_evals(settled, "heldout"), rl_evals(settled, "dev")
    if not steps and not heldout:
        return Chart(key="reward", title="Reward", note="This run had no step with a reward.")
    figure = go.Figure(
        line(column(steps, "step"), column(steps, "reward_mean"), "training, mean", PALE_BLUE)
    )
    for evals, name, color, symbol in (
        (dev, "dev", ORANGE, "circle-open"),
        (heldout, "held out", BLUE, "circle"),
    ):
        if evals:
            figure.add_trace(
                go.Scatter(
                    x=column(evals, "step"),
                    y=column(evals, "exact_match"),
                    name=name,
                    mode="lines+markers",
                    line={"color": color, "width": 1, "dash": "dot"},
                    marker={"color": color, "symbol": symbol, "size": 9},
                    customdata=column(evals, "version"),
                    hovertemplate="step %{x}, version %{customdata}: %{y:.3f}",
                )
            )
    figure.update_xaxes(title="train step (RL)")
    figure.update_yaxes(title="reward (share, 0–1)", rangemode="tozero")
    note = "Training reward is the batch's mean; no held-out evaluation was made."
    if heldout:
        note = (
            f"Training reward is the batch's mean; held out is greedy exact match on "
            f"{heldout[-1]['problems']} problems never trained on."
        )
    return Chart(key="reward", title="Reward", note=note, figure=styled(figure))


def density_chart(events: list[Event]) -> Chart:
    title = "Change density"
    deltas = of_kind(events, "publish", kind="delta")
    if not deltas:
        return Chart(key="density", title=title, note="No delta version was published.")
    figure = go.Figure(
        dots(column(deltas, "version"), column(deltas, "density", 100), "delta", BLUE, size=6)
    )
    figure.update_xaxes(title="weight version")
    figure.update_yaxes(title="changed elements (%)", rangemode="tozero")
    average = mean([e["density"] for e in deltas])
    note = (
        "Share of elements whose published bits differ from the version before; mean "
        f"{format_percent(average)} over {len(deltas)} deltas."
    )
    return Chart(key="density", title=title, note=note, figure=styled(figure, legend=False))


def wire_chart(events: list[Event]) -> Chart:
    title = "Bytes on the wire"
    versions = list({e["version"]: e for e in of_kind(events, "publish")}.values())
    if not versions:
        return Chart(key="wire", title=title, note="No version was published.")
    x = column(versions, "version")
    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    for kind, color, symbol in (("delta", BLUE, "circle"), ("anchor", ORANGE, "diamond")):
        own = of_kind(versions, "publish", kind=kind)
        if own:
            trace = dots(column(own, "version"), column(own, "frame_bytes"), kind, color, symbol)
            figure.add_trace(trace, row=1, col=1)
    full = {"color": MUTED, "width": 2, "dash": "dash"}
    for col, y in ((1, column(versions, "full_bytes")), (2, sums(versions, "full_bytes"))):
        trace = line(x, y, "full copy", MUTED, showlegend=col == 1)
        figure.add_trace(trace.update(line=full), row=1, col=col)
    total = line(x, sums(versions, "frame_bytes"), "sent, in total", BLUE)
    figure.add_trace(total, row=1, col=2)
    figure.update_xaxes(title="weight version")
    figure.update_yaxes(type="log", tickformat="~s", dtick="D2")
    figure.update_yaxes(title="bytes per version (log)", row=1, col=1)
    figure.update_yaxes(title="bytes since the start (log)", row=1, col=2)
    sent, copies = sums(versions, "frame_bytes")[-1], sums(versions, "full_bytes")[-1]
    note = (
        f"{format_bytes(sent)} were written for {len(versions)} versions, where full copies would "
        f"have been {format_bytes(copies)}: {copies / max(sent, 1):.3g} times less. An anchor "
        "holds every element."
    )
    return Chart(key="wire", title=title, note=note, figure=styled(figure, 320), wide=True)


def sums(events: list[Event], field: str) -> list[float]:
    return list(accumulate(e[field] for e in events))


def expert_chart(settled: list[Event]) -> Chart:
    title = "Expert load"
    numbered = enumerate(of_kind(settled, "train_step"), 1)  # not every step records its load
    recorded = {number: e["expert_load"] for number, e in numbered if e.get("expert_load")}
    if not recorded:
        return Chart(key="experts", title=title, note="No step recorded its expert load.")
    last = list(recorded.values())[-LOAD_STEPS:]
    layers = range(len(last[-1]))
    loads = [[sum(tokens) for tokens in zip(*(s[i] for s in last), strict=True)] for i in layers]
    relative = [[n * len(row) / max(sum(row), 1) for n in row] for row in loads]
    figure = make_subplots(cols=2, horizontal_spacing=0.16, column_widths=[0.54, 0.46])
    figure.add_trace(
        go.Heatmap(
            z=relative,
            y=[
                f"layer {i}<br>max {max(row):.2f}×, {row.count(0)} idle"
                for i, row in zip(layers, relative, strict=True)
            ],
            zmid=1,
            zmin=0,
            zmax=max(2.0, *map(max, relative)),
            colorscale=[[0, "#2b6cb0"], [0.5, "#f7f8fa"], [1, "#c2410c"]],
            colorbar={"title": "× mean", "thickness": 10, "x": 0.47, "len": 1.0},
            xgap=1,
            ygap=1,
            hovertemplate="expert %{x}, %{y}: %{z:.2f} × mean<extra></extra>",
        ),
        row=1,
        col=1,
    )
    colors = sample_colorscale("Viridis", [0.85 * i / max(len(layers) - 1, 1) for i in layers])
    for i in layers:
        ratio = [imbalance(load[i]) for load in recorded.values()]
        trace = line(list(recorded), ratio, f"layer {i}", colors[i])
        figure.add_trace(trace.update(line_width=1.3, showlegend=len(layers) <= 8), row=1, col=2)
    figure.update_xaxes(title="expert (logical order)", row=1, col=1)
    figure.update_xaxes(title="train step, counted over all phases", row=1, col=2)
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.update_yaxes(title="busiest expert / mean (×)", row=1, col=2)
    styled(figure, max(300, 120 + 34 * len(layers)))
    figure.update_layout(legend={"x": 0.62}, margin={"l": 116})
    note = (
        f"Left: tokens per expert over the last {len(last)} steps that recorded it, as "
        "a multiple of the layer's mean; idle experts had none. Right: the busiest "
        "expert of each layer, step by step; 1 is perfect balance."
    )
    return Chart(key="experts", title=title, note=note, figure=figure, wide=True)


def imbalance(load: list[int]) -> float | None:
    """Busiest expert over the mean; None when the layer saw no token."""
    return max(load) * len(load) / sum(load) if sum(load) else None
