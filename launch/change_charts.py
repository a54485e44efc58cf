"""The charts of where a run's weights changed: how much, how much anew, in which part of the model.

The one idea: counts of `change` events, over the elements of the group they are of; the last event
tells of the whole phase since its start.
"""

from __future__ import annotations

import re

import plotly.graph_objects as go
from gossamer.launch.charts import BLUE, GREEN, MUTED, ORANGE, TEAL, Chart, column, line, styled
from gossamer.launch.quantities import format_percent
from gossamer.launch.summary import Event, of_kind
from plotly.subplots import make_subplots

CURVES = (
    ("changed_share", "changed since the last measurement", BLUE),
    ("ever_share", "ever changed", ORANGE),
    ("net_share", "differs from the start", GREEN),
    ("kept_share", "of those changed: last time, too", MUTED),
    ("seen_share", "of those changed: ever before", TEAL),
)


def change_chart(events: list[Event]) -> Chart | None:
    """None for a run that did not measure it (metrics.changes_every_steps)."""
    changes = of_kind(events, "change")
    if not changes:
        return None
    last = changes[-1]
    figure = make_subplots(cols=2, column_widths=[0.45, 0.55], horizontal_spacing=0.14)
    for field, name, color in CURVES:
        curve = line(column(changes, "step"), column(changes, field, 100), name, color)
        figure.add_trace(curve, row=1, col=1)
    heat, rows = _heat(last)
    figure.add_trace(heat, row=1, col=2)
    styled(figure, max(380, 160 + 26 * rows))
    figure.update_xaxes(title="train step", row=1, col=1)
    figure.update_yaxes(title="elements (%)", range=[0, 102], row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=2)
    figure.update_xaxes(title="part of the layer (experts in logical order)", row=1, col=2)
    figure.update_layout(margin={"b": 90})
    note = (
        f"Published bits, from step {last['since_step']} to {last['step']}: "
        f"{format_percent(last['ever_share'])} of the elements ever changed and "
        f"{format_percent(last['net_share'])} now differ from where they were. "
        "Right: the share that differs, by layer and part."
    )
    title = "Where weights changed"
    return Chart(key="changes", title=title, note=note, figure=figure, wide=True)


def _heat(last: Event) -> tuple[go.Heatmap, int]:
    """Layers by parts, and how many rows it has; what is in no layer has a row of its own."""
    share: dict[tuple[str, str], float] = {}
    for group, elements, net in zip(last["groups"], last["elements"], last["net"], strict=True):
        layer, _, part = group.rpartition("/")
        row = f"layer {layer}" if layer else re.sub(r"^model\.|\.weight$", "", part)
        share[row, part.removeprefix("expert ") if layer else "all"] = 100 * net / elements
    rows = list(dict.fromkeys(row for row, _ in share))
    parts = sorted(
        {part for _, part in share}, key=lambda p: (p == "all", not p.isdigit(), p.zfill(9))
    )
    heat = go.Heatmap(
        z=[[share.get((row, part)) for part in parts] for row in rows],
        x=[f"expert {part}" if part.isdigit() else part for part in parts],
        y=rows,
        zmin=0,
        zmax=max(share.values()),
        colorscale="Viridis",
        colorbar={"title": "%", "thickness": 10},
        xgap=1,
        ygap=1,
        hovertemplate="%{y}, %{x}: %{z:.3g} %<extra></extra>",
    )
    return heat, len(rows)
