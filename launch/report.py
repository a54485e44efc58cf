"""report.html: one file that shows a run, opens offline and asks the network for nothing.

The one idea: the page is made from metrics.jsonl (and shows the config.json beside it), with
plotly.js inside, so it can be mailed, archived, and made for a run that was killed. A content
policy in the page forbids requests.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from gossamer.launch.change_charts import change_chart
from gossamer.launch.charts import (
    Chart,
    density_chart,
    expert_chart,
    loss_chart,
    reward_chart,
    wire_chart,
    words,
)
from gossamer.launch.gantt import gantt_chart
from gossamer.launch.mask_charts import mask_chart
from gossamer.launch.quantities import (
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_percent,
)
from gossamer.launch.replicas_charts import round_chart
from gossamer.launch.summary import Event, of_kind, read_events, settle, summarise, write_whole
from gossamer.launch.timeline import pause_chart, throughput_chart, timeline_chart
from gossamer.trainer.run_folder import put_beside
from plotly.io import to_html
from plotly.offline import get_plotlyjs

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)

STYLE = """
:root { --ink: #1f2933; --muted: #616e7c; --rule: #e4e7eb; --paper: #fff; --ground: #f5f7fa }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px }
header p { margin: 0; color: var(--muted) }
h1 { margin: 2px 0 6px; font-size: 28px; line-height: 1.2; letter-spacing: -.01em }
h1 span { font-size: 13px; font-weight: 500; letter-spacing: 0; vertical-align: middle;
  margin-left: 10px; padding: 3px 10px; border-radius: 99px; background: var(--rule) }
h2 { margin: 0; font-size: 16px }
section p { margin: 2px 0 6px; color: var(--muted); font-size: 13.5px; max-width: 86ch }
.cards { display: grid; gap: 10px; margin: 22px 0 14px;
  grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)) }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(2, minmax(0, 1fr));
  grid-auto-flow: dense }
.card, section { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px }
.card { padding: 12px 14px }
.card b { display: block; font-size: 17px; line-height: 1.5; white-space: nowrap }
.card small { display: block; color: var(--muted); font-size: 12.5px; line-height: 1.35 }
.good b { color: #2b8a3e } .bad b { color: #c2255c }
section { padding: 16px 18px 8px; min-width: 0 }
.wide { grid-column: 1 / -1 }
details { margin-top: 14px; padding: 12px 18px; background: var(--paper); font-size: 13.5px;
  border: 1px solid var(--rule); border-radius: 10px }
summary { cursor: pointer; font-weight: 600 }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; margin: 6px 0 8px }
th { color: var(--muted); font-weight: 500 } th, td { text-align: left; padding: 4px 8px;
  border-top: 1px solid var(--rule); font-variant-numeric: tabular-nums }
pre { overflow: auto; max-height: 480px; font-size: 12.5px }
footer { margin-top: 24px; color: var(--muted); font-size: 13px }
@media (max-width: 860px) { .charts { grid-template-columns: minmax(0, 1fr) } }
@media print { body { background: #fff } section { break-inside: avoid } }
"""


def span(first: float | None, last: float | None, percent: bool = False) -> str:
    """'first → last', or a dash when nothing was measured."""
    if first is None or last is None:
        return MISSING
    if percent:
        return f"{format_number(100 * first, 3)} → {format_percent(last)}"
    return f"{format_number(first, 3)} → {format_number(last, 3)}"


def summary_cards(summary: Event) -> list[tuple[str, str, str, str]]:
    """(what, value, remark, css class) of each card."""
    wire, full, versions = summary["wire_bytes"], summary["full_bytes"], summary["versions"]
    problems, dead = summary["heldout_problems"], summary["engines_dead"]
    rewards = span(summary["reward_first"], summary["reward_last"], percent=True)
    asked = f"exact match, {problems} problems" if problems else "no evaluation in the RL phase"
    less = f"{full / wire:.3g}× less than {format_bytes(full)}" if wire else "nothing published"
    newest = f"newest: {summary['version_last']}" if versions else "nothing published"
    engines = (MISSING, "no version to hold", "")
    if summary["engines_bit_exact"]:
        engines = ("bit-exact", "every last audit equal", "good")
    elif versions:
        engines = ("not proven", "an audit is missing, old or unequal", "bad")
    heldout = "means of 10 steps"
    if summary["heldout_loss_last"] is not None:
        heldout += f"; held out {format_number(summary['heldout_loss_last'], 3)}"
    if summary["skips"]:
        heldout += f"; {summary['skips']} skipped"
    peak = "not measured"
    if summary["peak_flops"]:
        peak = f"of {format_count(summary['peak_flops'])}FLOP/s, {summary['peak_source']}"
    attempts = "1 attempt" if summary["attempts"] == 1 else f"{summary['attempts']} attempts"
    lost = f", {dead} engine{'s' * (dead > 1)} lost" if dead else ""
    return [
        ("Held-out reward", rewards, asked, ""),
        ("Loss", span(summary["loss_first"], summary["loss_last"]), heldout, ""),
        ("On the wire", format_bytes(wire), less, ""),
        ("Changed a version", format_percent(summary["change_density_mean"]), "of elements", ""),
        ("Versions", str(versions), newest, ""),
        ("Engines", *engines),
        ("MFU", format_percent(summary["mfu_mean"]), peak, ""),
        ("Wall time", format_duration(summary["wall_s"]), attempts + lost, ""),
    ]


def essentials(summary: Event, start: Event) -> str:
    """The configuration in one line."""
    phases = [p if isinstance(p, str) else p.get("name", "?") for p in start.get("phases") or []]
    facts = [
        ("seed", summary["seed"]),
        ("parameters", summary["params"] and format_count(summary["params"])),
        ("active per token", summary["active_params"] and format_count(summary["active_params"])),
        ("ranks", summary["world_size"]),
        ("expert parallel", summary["ep_size"]),
        ("ZeRO stage", summary["zero_stage"]),
        ("rollout engines", summary["engines"]),
        ("phases", ", ".join(map(words, phases)) or None),
    ]
    known = [f"{name}&nbsp;<b>{escape(str(v))}</b>" for name, v in facts if v is not None]
    return " · ".join(known)


def section(chart: Chart) -> str:
    figure = ""
    if chart.figure is not None:
        figure = to_html(
            chart.figure,
            include_plotlyjs=False,
            full_html=False,
            div_id=chart.key,
            config={"displayModeBar": False, "responsive": True},
        )
    wide = ' class="wide"' if chart.wide and figure else ""
    return f"<section{wide}><h2>{chart.title}</h2><p>{escape(chart.note)}</p>{figure}</section>"


def page(events: list[Event], summary: Event, config: str) -> str:
    """The whole HTML of the report; `config`: the resolved config as text, or nothing."""
    settled, start = settle(events), of_kind(events, "run_start")[-1]
    charts = [
        loss_chart(settled),
        reward_chart(settled),
        gantt_chart(events),
        wire_chart(events),
        timeline_chart(events),
        pause_chart(events),
        density_chart(events),
        throughput_chart(events),
        expert_chart(settled),
    ]
    if of_kind(events, "outer_round"):
        charts.append(round_chart(events))
    if (changes := change_chart(settled)) is not None:
        charts.append(changes)
    if (masks := mask_chart(settled)) is not None:
        charts.append(masks)
    reason = summary["end_reason"]
    charts.sort(key=lambda chart: chart.figure is None)  # what could not be drawn, at the end
    return html_page(
        name=str(summary["name"]),
        state=f"ended: {reason}" if reason else "running, or killed",
        facts=essentials(summary, start),
        cards=summary_cards(summary),
        charts=charts,
        config=config,
    )


def html_page(
    *,
    name: str,
    state: str,
    facts: str,
    cards: list[tuple[str, str, str, str]],
    charts: list[Chart],
    config: str,
    below: str = "",
) -> str:
    """A page of cards, charts and the config; `facts` and `below` are HTML, all else is text."""
    name = escape(name)
    if config:
        config = f"<details><summary>Resolved config</summary><pre>{escape(config)}</pre></details>"
    shown = "".join(
        f'<div class="card {css}"><small>{what}</small><b>{value}</b><small>{remark}</small></div>'
        for what, value, remark, css in cards
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · Gossamer</title>
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script></head>
<body><main>
<header><p>Gossamer run</p><h1>{name}<span>{escape(state)}</span></h1>
<p>{facts}</p></header>
<div class="cards">{shown}</div>
<div class="charts">{"".join(map(section, charts))}{below}</div>
{config}
<footer>Made from metrics.jsonl. Sizes are in powers of 1000; a step that a later attempt did
again counts once in the curves of learning, and as often as it ran in bytes and times.</footer>
</main></body></html>
"""


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html, returns its path. Raises ValueError for unreadable metrics."""
    run_dir = Path(run_dir)
    config = run_dir / "config.json"
    text = config.read_text() if config.is_file() else ""
    html = page(read_events(run_dir), summarise(run_dir), text)
    path = write_whole(run_dir / "report.html", html)
    put_beside(run_dir, path.name)
    return path
