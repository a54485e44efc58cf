"""The pictures of a placement: loads of ranks and bytes between them, before and after.

The one idea: both sides share one scale, so what moved is what one sees. One file that opens
offline, as report.html.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from gossamer.launch.charts import BLUE, MUTED, Chart, line, styled
from gossamer.launch.quantities import format_bytes, format_percent
from gossamer.launch.report import POLICY, STYLE, section
from gossamer.launch.summary import write_whole
from gossamer.parallel.placement.placement import Placement
from gossamer.parallel.placement.problem import DISPATCHES, Problem
from gossamer.parallel.placement.score import Score
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

AROUND_MEAN = [[0, "#2b6cb0"], [0.5, "#f7f8fa"], [1, "#c2410c"]]


def write_page(
    path: Path, problem: Problem, placed: Placement, before: Score, after: Score
) -> Path:
    """Writes the HTML; `before`: of the contiguous placement."""
    charts = [
        _loads(problem, before, after),
        _busiest(problem, before, after),
        _traffic(problem, before, after),
    ]
    saved = before.across_bytes - after.across_bytes
    cards = [
        (
            "Busiest rank / mean",
            f"{before.max_over_mean:.3f} → {after.max_over_mean:.3f}",
            "all layers in turn",
        ),
        (
            "Across nodes, a step",
            format_bytes(after.across_bytes / problem.steps),
            f"{format_percent(saved / max(before.across_bytes, 1))} less than contiguous",
        ),
        ("Gap", format_percent(placed.gap), f"of the objective, {placed.objective}"),
    ]
    shown = "".join(
        f'<div class="card"><small>{what}</small><b>{value}</b><small>{remark}</small></div>'
        for what, value, remark in cards
    )
    topology = problem.topology
    html = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Expert placement · Gossamer</title>
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script></head>
<body><main>
<header><p>Gossamer placement, {placed.method}</p><h1>{topology.nodes} nodes ×
{topology.ranks_per_node} ranks, {len(problem.layers)} layers of {problem.experts} experts</h1>
</header>
<div class="cards">{shown}</div>
<div class="charts">{"".join(map(section, charts))}</div>
<footer>Bytes are those of the dispatcher {problem.dispatch} ({DISPATCHES[problem.dispatch].who}),
forward and backward. Bound proven by: {placed.proof}.</footer>
</main></body></html>
"""
    return write_whole(path, html)


def _loads(problem: Problem, before: Score, after: Score) -> Chart:
    """Pairs of each rank, as a multiple of the layer's mean."""
    shares = [
        s.load_LR / np.maximum(s.load_LR.mean(1, keepdims=True), 1e-9) for s in (before, after)
    ]
    top = max(2.0, *(float(share.max()) for share in shares))
    return Chart(
        key="loads",
        title="Load of ranks",
        note="Pairs that each rank computes, as a multiple of its layer's mean.",
        figure=_two_heatmaps(
            shares, names("layer", problem.layers), top, AROUND_MEAN, "× mean", "layer"
        ),
        wide=True,
    )


def _traffic(problem: Problem, before: Score, after: Score) -> Chart:
    """Bytes from rank to rank, all layers."""
    per_step = [s.bytes_LRR.sum(0) / problem.steps / 1e6 for s in (before, after)]
    top = max(1e-9, *(float(matrix.max()) for matrix in per_step))
    figure = _two_heatmaps(
        per_step, names("", range(problem.topology.ranks)), top, "Blues", "MB", "from rank"
    )
    for edge in np.arange(1, problem.topology.nodes) * problem.topology.ranks_per_node - 0.5:
        for col in (1, 2):
            figure.add_vline(edge, line={"color": MUTED, "width": 1}, row=1, col=col)
            figure.add_hline(edge, line={"color": MUTED, "width": 1}, row=1, col=col)
    return Chart(
        key="traffic",
        title="Traffic",
        note="MB that each rank sends to each other in a step; lines part the nodes.",
        figure=figure,
        wide=True,
    )


def _busiest(problem: Problem, before: Score, after: Score) -> Chart:
    """Busiest rank over the mean, layer by layer."""
    figure = go.Figure()
    for found, name, color in ((before, "contiguous", MUTED), (after, "placed", BLUE)):
        ratio = found.load_LR.max(1) / np.maximum(found.load_LR.mean(1), 1e-9)
        figure.add_trace(line(list(problem.layers), ratio.tolist(), name, color))
    figure.update_xaxes(title="layer")
    figure.update_yaxes(title="busiest rank / mean (×)")
    note = "What the layer's slowest rank computes, against an even share."
    return Chart(key="busiest", title="Busiest rank", note=note, figure=styled(figure), wide=True)


def names(word: str, numbers: tuple[int, ...] | range) -> list[str]:
    return [f"{word} {n}".strip() for n in numbers]


def _two_heatmaps(
    pair: list[np.ndarray],
    rows: list[str],
    top: float,
    colors: list | str,
    unit: str,
    row_title: str,
) -> go.Figure:
    """Contiguous (the first) left, placed right, one scale."""
    figure = make_subplots(cols=2, subplot_titles=("contiguous", "placed"), shared_yaxes=True)
    for col, z in enumerate(pair, 1):
        heat = go.Heatmap(
            z=z,
            y=rows,
            zmin=0,
            zmax=top,
            colorscale=colors,
            showscale=col == 2,
            colorbar={"title": unit, "thickness": 10},
            hovertemplate=f"%{{y}}, rank %{{x}}: %{{z:.3g}} {unit}<extra></extra>",
        )
        figure.add_trace(heat, row=1, col=col)
    styled(figure, max(300, 140 + 12 * len(rows)), legend=False)
    figure.update_xaxes(title="rank", row=1)
    figure.update_yaxes(autorange="reversed", title=row_title, row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=2)
    figure.update_layout(margin={"t": 50})
    return figure
