"""summary.json and report.html of a run of several replicas.

The one idea: the same page as one run's, made from what the replicas and their rounds left behind.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from gossamer.launch.quantities import (
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
)
from gossamer.launch.recipe import load_recipe
from gossamer.launch.replicas_charts import (
    cost_chart,
    learning_chart,
    life_chart,
    membership_chart,
    message_chart,
)
from gossamer.launch.replicas_members import open_rounds
from gossamer.launch.replicas_summary import Fleet, read_fleet, summarise_fleet
from gossamer.launch.report import html_page
from gossamer.launch.summary import Event, write_whole

COLUMNS = {
    "replica": lambda name, _: name,
    "state": lambda _, r: r["state"] or MISSING,
    "steps": lambda _, r: format_count(r["steps"]),
    "rounds": lambda _, r: format_count(r["rounds"]),
    "tokens counted": lambda _, r: format_count(r["tokens"]),
    "loss": lambda _, r: format_number(r["loss_last"]),
    "held out": lambda _, r: format_number(r["heldout_loss_last"]),
    "busy": lambda _, r: format_percent(r["utilisation"]),
    "restarts": lambda _, r: str(r["restarts"] or ""),
    "weights": lambda _, r: r["state_hash"] or MISSING,
}


def write_fleet_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/summary.json and RUN_DIR/report.html; returns the path of the second.

    Raises ValueError for unreadable metrics.
    """
    config = run_dir / "config.json"
    fleet = read_fleet(run_dir, open_rounds(load_recipe(str(config), []), run_dir))
    summary = summarise_fleet(fleet, run_dir)
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return write_whole(run_dir / "report.html", fleet_page(fleet, summary, config.read_text()))


def fleet_page(fleet: Fleet, summary: Event, config: str) -> str:
    """The whole HTML of the report; `config`: the resolved config as text."""
    charts = [
        learning_chart(fleet),
        membership_chart(fleet),
        message_chart(fleet),
        cost_chart(fleet),
        life_chart(fleet),
    ]
    charts.sort(key=lambda chart: chart.figure is None)
    joined = ", ".join(summary["joined"])
    facts = f"{len(summary['replicas'])} replicas started here" + (
        f", {escape(joined)} joined from elsewhere" if joined else ""
    )
    return html_page(
        name=summary["name"],
        state=f"ended: {summary['end_reason']}" if summary["end_reason"] else "running, or killed",
        facts=facts,
        cards=fleet_cards(summary),
        charts=charts,
        below=_table(summary),
        config=config,
    )


def fleet_cards(summary: Event) -> list[tuple[str, str, str, str]]:
    """(what, value, remark, css class) of each card."""
    wire, dense = summary["wire_bytes"], summary["dense_bytes"]
    less = f"{dense / wire:.3g}× less than float32" if wire and dense else "nothing counted"
    equal = {True: ("bit-exact", "good"), False: ("DIFFER", "bad"), None: (MISSING, "")}
    value, css = equal[summary["hashes_equal"]]
    late = f"{summary['late']} late, {summary['refused']} refused"
    restarts = summary["restarts"]
    return [
        ("Rounds", str(summary["rounds"]), late, ""),
        ("Tokens counted", format_count(summary["tokens"]), "by the books", ""),
        ("On the wire", format_bytes(wire), less, ""),
        ("Busy", format_percent(summary["utilisation"]), "of the time in inner steps", ""),
        ("Weights", value, "after every round, all replicas", css),
        ("Restarts", str(restarts), "of replicas that died", ""),
        ("Wall time", format_duration(summary["wall_s"]), "from first to last event", ""),
    ]


def _table(summary: Event) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    rows = ""
    for name, told in summary["replicas"].items():
        cells = [escape(str(cell(name, told))) for cell in COLUMNS.values()]
        cells[0] = f'<a href="{escape(name)}/report.html">{cells[0]}</a>'
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f"<section class='wide'><h2>Replicas</h2><table>{head}{rows}</table></section>"
