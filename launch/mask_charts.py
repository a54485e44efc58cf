"""The chart of a sparsity plan at work: densities as they are and as they were to be, and flips.

The one idea: what `masks` events tell, each a step in time; a density holds until the next event.
"""

from __future__ import annotations

import plotly.graph_objects as go
from gossamer.launch.charts import BLUE, GREEN, MUTED, ORANGE, Chart, column, line, styled
from gossamer.launch.quantities import format_count, format_percent
from gossamer.launch.summary import Event, of_kind
from plotly.subplots import make_subplots


def mask_chart(settled: list[Event]) -> Chart | None:
    """None for a run without train.sparsity."""
    newest = {e["step"]: e for e in of_kind(settled, "masks")}  # a resumed run tells some twice
    if not newest:
        return None
    masks = [newest[step] for step in sorted(newest)]
    last, figure = masks[-1], make_subplots(cols=3, horizontal_spacing=0.1)
    steps = column(masks, "step")
    trained = [e for e in of_kind(settled, "train_step") if "mask_density" in e]
    curves = (
        (steps, column(masks, "target", 100), "target density", MUTED),
        (column(trained, "step"), column(trained, "mask_density", 100), "density", BLUE),
        (column(trained, "step"), column(trained, "mean_density", 100), "mean so far", GREEN),
    )
    for x, y, name, color in curves:
        figure.add_trace(line(x, y, name, color), row=1, col=1)
    figure.data[0].line.update(dash="dot", shape="hv")
    flips = line(steps, column(masks, "flip_rate", 100), "flips a step", ORANGE)
    figure.add_trace(flips, row=1, col=2)
    dead = line(steps, column(masks, "dead_row_share", 100), "dead rows", MUTED)
    figure.add_trace(dead, row=1, col=2)
    figure.add_trace(_heat(last), row=1, col=3)
    styled(figure, 380)
    for at, title in ((1, "weights (%)"), (2, "elements, rows (%)")):
        figure.update_xaxes(title="train step", row=1, col=at)
        figure.update_yaxes(title=title, row=1, col=at)
    figure.update_yaxes(range=[0, 102], row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=3)
    note = (
        f"{format_percent(last['density'])} of the governed weights live since step"
        f" {last['step']} (target {format_percent(last['target'])}), in {len(masks)} changes."
    )
    if trained:
        end = trained[-1]
        note += (
            f" On average {format_count(end['mean_params'])} weights of the model lived; a machine"
            f" that skips the others would have computed {format_percent(end['mean_sparse_share'])}"
            " of the dense FLOPs."
        )
    note += " Right: densities at the end."
    return Chart(key="masks", title="Sparsity plan", note=note, figure=figure, wide=True)


def _heat(last: Event) -> go.Heatmap:
    """Of the experts, layer by layer, or, where no expert is governed, of the layers."""
    by_expert = last["expert_density"]
    rows = by_expert or [[density] for density in last["layer_density"]]
    targets = last["expert_target"] if by_expert else [[each] for each in last["layer_target"]]
    return go.Heatmap(
        z=[[100 * density for density in row] for row in rows],
        x=[f"expert {i}" for i in range(len(rows[0]))] if by_expert else ["all"],
        y=[f"MoE layer {i}" for i in range(len(rows))] if by_expert else last["layers"],
        zmin=0,
        zmax=100,
        colorscale="Viridis",
        colorbar={"title": "%", "thickness": 10},
        xgap=1,
        ygap=1,
        customdata=[[100 * target for target in row] for row in targets],
        hovertemplate="%{y}, %{x}: %{z:.3g} %, target %{customdata:.3g} %<extra></extra>",
    )
