"""The charts of replicas: what each learned, who counted when, what a round cost.

The one idea: as all charts, each is made from events; who counted comes from the records of rounds.
"""

from __future__ import annotations

import plotly.graph_objects as go
from gossamer.launch.charts import (
    BLUE,
    ENGINE_COLORS,
    GREEN,
    MUTED,
    ORANGE,
    PALE_BLUE,
    RED,
    Chart,
    column,
    line,
    styled,
)
from gossamer.launch.quantities import format_bytes, format_duration, format_percent
from gossamer.launch.replicas_summary import Fleet, outer_rounds
from gossamer.launch.summary import Event, mean, of_kind, settle

COSTS = (
    ("compute_s", "inner steps", PALE_BLUE),
    ("send_s", "send", ORANGE),
    ("wait_s", "wait", RED),
    ("apply_s", "apply", GREEN),
)
FATES = ("absent", "refused", "late", "counted")
FATE_COLORS = ("#f1f3f5", RED, ORANGE, "#b2dfb8")


def color_of(number: int) -> str:
    return (BLUE, *ENGINE_COLORS)[number % (1 + len(ENGINE_COLORS))]


def learning_chart(fleet: Fleet) -> Chart:
    """The loss of each replica."""
    figure = go.Figure()
    for number, (name, events) in enumerate(sorted(fleet.replicas.items())):
        settled, color = settle(events), color_of(number)
        steps = of_kind(settled, "train_step")
        figure.add_trace(line(*_with_gaps(steps), name, color))
        evals = of_kind(settled, "eval", name="text")
        if evals:
            held = line(column(evals, "step"), column(evals, "loss"), f"{name}, held out", color)
            marker = {"symbol": "diamond", "size": 8}
            figure.add_trace(held.update(mode="markers", marker=marker, showlegend=False))
    figure.update_xaxes(title="inner step")
    figure.update_yaxes(title="cross-entropy (nats per token)")
    note = "Each replica on its own documents."
    if any(of_kind(events, "eval", name="text") for events in fleet.replicas.values()):
        note += " Diamonds: on text that none is trained on."
    return Chart(key="learning", title="Loss", note=note, figure=styled(figure), wide=True)


def membership_chart(fleet: Fleet) -> Chart:
    """Whose message counted in which round."""
    title, records = "Who counted", fleet.records
    if not records:
        return Chart(key="members", title=title, note="No record of a round is at hand.")
    fates = []
    for name in fleet.names:
        late = {
            e.round for r in records for e in r.counted if e.replica == name != e.round < r.round
        }
        in_time = {
            r.round for r in records for e in r.counted if (e.replica, e.round) == (name, r.round)
        }
        refused = {r.round for r in records if name in r.refused}
        fates.append(
            [
                3 if n in in_time else 2 if n in late else 1 if n in refused else 0
                for n in (record.round for record in records)
            ]
        )
    scale = [[(i + edge) / 4, color] for i, color in enumerate(FATE_COLORS) for edge in (0, 1)]
    heat = go.Heatmap(
        z=fates,
        x=[record.round for record in records],
        y=fleet.names,
        text=[[FATES[fate] for fate in row] for row in fates],
        hovertemplate="round %{x}, %{y}: %{text}<extra></extra>",
        colorscale=scale,
        zmin=-0.5,
        zmax=3.5,
        xgap=1,
        ygap=2,
        colorbar={"tickvals": list(range(4)), "ticktext": list(FATES), "thickness": 12},
    )
    figure = styled(go.Figure(heat), height=90 + 34 * len(fleet.names), legend=False)
    figure.update_xaxes(title="round", tickformat="d", dtick=_tick(len(records)))
    figure.update_yaxes(autorange="reversed")
    note = "By the records: a message counts in its round, a round late, or not at all."
    return Chart(key="members", title=title, note=note, figure=figure, wide=True)


def message_chart(fleet: Fleet) -> Chart:
    """Bytes of the messages of each round."""
    title, records = "On the wire", fleet.records
    counted = [(r.round, e) for r in records for e in r.counted]
    if not counted:
        return Chart(key="messages", title=title, note="No record of a round is at hand.")
    figure = go.Figure()
    for number, name in enumerate(fleet.names):
        own = [(at, sum(part.nbytes for part in e.parts)) for at, e in counted if e.replica == name]
        x, y = [at for at, _ in own], [nbytes / 1e6 for _, nbytes in own]
        figure.add_trace(go.Bar(x=x, y=y, name=name, marker={"color": color_of(number)}))
    figure.update_layout(barmode="stack", bargap=0.15)
    figure.update_xaxes(title="round", tickformat="d", dtick=_tick(len(records)))
    figure.update_yaxes(title="messages that counted (MB)")
    each = mean([sum(part.nbytes for part in e.parts) for _, e in counted])
    note = f"Length of the frames as they lie in the store; {format_bytes(each)} a message."
    return Chart(key="messages", title=title, note=note, figure=styled(figure))


def cost_chart(fleet: Fleet) -> Chart:
    """Where each replica's time went."""
    title, found = "Where the time went", {n: outer_rounds(e) for n, e in fleet.replicas.items()}
    found = {name: rounds for name, rounds in sorted(found.items()) if rounds}
    if not found:
        return Chart(key="costs", title=title, note="No round was finished.")
    figure = go.Figure()
    for field, name, color in COSTS:
        y = [sum(e[field] for e in rounds) / len(rounds) for rounds in found.values()]
        figure.add_trace(go.Bar(x=list(found), y=y, name=name, marker={"color": color}))
    figure.update_layout(barmode="stack", bargap=0.4)
    figure.update_yaxes(title="seconds a round (mean)")
    busy = mean([e["utilisation"] for rounds in found.values() for e in rounds])
    note = f"{format_percent(busy)} of the time went into inner steps."
    return Chart(key="costs", title=title, note=note, figure=styled(figure))


def round_chart(events: list[Event]) -> Chart:
    """One replica's rounds, one after the other."""
    rounds = outer_rounds(events)
    figure = go.Figure()
    for field, name, color in COSTS:
        x, y = column(rounds, "round"), column(rounds, field)
        figure.add_trace(go.Bar(x=x, y=y, name=name, marker={"color": color}))
    figure.update_layout(barmode="stack", bargap=0.1)
    figure.update_xaxes(title="round", tickformat="d", dtick=_tick(len(rounds)))
    figure.update_yaxes(title="seconds")
    sent = sum(e["wire_bytes_sent"] for e in rounds)
    read = sum(e["wire_bytes_read"] for e in rounds)
    note = (
        f"{len(rounds)} rounds with other replicas: {format_bytes(sent)} sent,"
        f" {format_bytes(read)} read."
    )
    return Chart(key="rounds", title="Rounds", note=note, figure=styled(figure), wide=True)


def life_chart(fleet: Fleet) -> Chart:
    """When each replica ran."""
    told = of_kind(fleet.events, "replica")
    title = "Lives"
    if not told:
        return Chart(key="lives", title=title, note="No replica was started.")
    zero_s, end_s = told[0]["time_s"], max(e["time_s"] for e in fleet.events)
    figure, deaths = go.Figure(), []
    for number, name in enumerate(sorted({e["replica"] for e in told})):
        own, base, length = [e for e in told if e["replica"] == name], [], []
        for event, after in zip(own, [*own[1:], None], strict=True):
            if event["what"] in ("started", "restarted"):
                base.append(event["time_s"] - zero_s)
                length.append((after["time_s"] if after else end_s) - event["time_s"])
            elif event["what"] != "finished":
                deaths.append(event)
        bar = go.Bar(x=length, base=base, y=[name] * len(base), orientation="h", width=0.5)
        figure.add_trace(bar.update(marker={"color": color_of(number), "opacity": 0.6}))
    cross = {"symbol": "x", "size": 10, "color": RED, "line": {"color": MUTED}}
    x, y = [e["time_s"] - zero_s for e in deaths], [e["replica"] for e in deaths]
    words = [f"{e['what']}: {e.get('reason', '')}" for e in deaths]
    figure.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=cross, hovertext=words))
    figure.update_xaxes(title="time since the start (s)")
    figure.update_yaxes(autorange="reversed")
    note = f"Over {format_duration(end_s - zero_s)}; a cross is a death, and why is under it."
    height = 100 + 34 * len({e["replica"] for e in told})
    return Chart(
        key="lives", title=title, note=note, figure=styled(figure, height, False), wide=True
    )


def _with_gaps(steps: list[Event]) -> tuple[list[int | None], list[float | None]]:
    """Steps and losses, with a gap where a replica went on at the step of the others."""
    x: list[int | None] = []
    y: list[float | None] = []
    for event in steps:
        if x and event["step"] != x[-1] + 1:  # type: ignore[operator]
            x.append(None)
            y.append(None)
        x.append(event["step"])
        y.append(event["loss"])
    return x, y


def _tick(rounds: int) -> int:
    return max(1, rounds // 10)
