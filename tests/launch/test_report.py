"""report.html: complete, offline, and its charts hold the numbers of the events."""

from __future__ import annotations

import re

import plotly.graph_objects as go
import pytest
from gossamer.launch import charts, gantt, timeline
from gossamer.launch.quantities import (
    MISSING,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
)
from gossamer.launch.report import write_report
from gossamer.launch.summary import of_kind, read_events, settle
from plotly.offline import get_plotlyjs
from synthetic_run import FULL_BYTES, WARM_STEPS, SyntheticRun, write_run

SETTLED = (charts.loss_chart, charts.reward_chart, charts.expert_chart)
ALL = (
    charts.density_chart,
    charts.wire_chart,
    timeline.timeline_chart,
    timeline.pause_chart,
    timeline.throughput_chart,
    gantt.gantt_chart,
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    write_run(path)
    return path


@pytest.fixture(scope="module")
def events(run_dir):
    return read_events(run_dir)


def drawn(events):
    return [c(settle(events)) for c in SETTLED] + [c(events) for c in ALL]


def own_html(path):
    """The page without plotly.js, whose source names hosts that it is never asked to call."""
    html = path.read_text()
    assert get_plotlyjs() in html
    return html.replace(get_plotlyjs(), "")


def test_heldout_loss_is_drawn_beside_its_phases_loss(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    for step, phase in enumerate(("pretrain", "pretrain", "sft"), 1):
        run.add("train_step", phase=phase, step=step, loss=2.0)
        run.add("eval", name="text", step=step, phase=phase, loss=3.0 - step, tokens=77)
    chart = charts.loss_chart(settle(read_events(tmp_path)))
    held = [t for t in chart.figure.data if t.name == "held out"]
    assert [(list(t.x), list(t.y)) for t in held] == [([1, 2], [2.0, 1.0]), ([3], [0.0])]
    assert "77 tokens" in chart.note
    assert "held out 0" in own_html(write_report(tmp_path))


def test_the_page_is_one_file_that_asks_the_network_for_nothing(run_dir):
    path = write_report(run_dir)
    html = own_html(path)
    assert not re.search(r"https?:|\b(src|href)=|@import|url\(", html)
    assert "default-src 'none'" in html
    assert html.count("Plotly.newPlot") == len(SETTLED + ALL)
    assert {p.name for p in run_dir.iterdir()} == {"metrics.jsonl", "report.html"}


def test_the_config_beside_the_run_is_shown(tmp_path):
    write_run(tmp_path)
    assert "Resolved config" not in own_html(write_report(tmp_path))
    (tmp_path / "config.json").write_text('{"name": "<b>"}')
    assert "{&quot;name&quot;: &quot;&lt;b&gt;&quot;}" in own_html(write_report(tmp_path))


def test_cards_say_what_the_summary_says(run_dir):
    html = own_html(write_report(run_dir))
    assert "bit-exact" in html and "2 attempts, 1 engine lost" in html
    assert "21.3 M" in html and "ended: done" in html


def test_every_chart_is_drawn_with_a_title_on_every_axis(events):
    for chart in drawn(events):
        for axis in (*chart.figure.select_xaxes(), *chart.figure.select_yaxes()):
            is_named = axis.categoryarray is not None or axis.ticktext is not None
            is_category = is_named or axis.autorange == "reversed"
            is_shared = axis.matches is not None and axis.showticklabels is False
            assert axis.title.text or is_category or is_shared, (chart.key, axis.plotly_name)


def test_an_empty_run_is_told_in_sentences(tmp_path):
    run = SyntheticRun(tmp_path)
    run.add("run_start", name="<script>x</script>", seed=1)
    html = own_html(write_report(tmp_path))
    assert "Plotly.newPlot" not in html
    assert html.count("<section") == len(SETTLED + ALL)
    assert "No version was published." in html
    assert "<script>x" not in html


def test_a_name_in_a_figure_cannot_close_the_script(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    run.publish(1)
    run.commit("</script><b>")
    assert "</script><b>" not in own_html(write_report(tmp_path))


def test_wire_chart_sums_what_was_written(events):
    figure = charts.wire_chart(events).figure
    publishes = of_kind(events, "publish")
    totals = next(t for t in figure.data if t.name == "sent, in total")
    assert totals.y[-1] == sum(e["frame_bytes"] for e in publishes)
    copies = [t for t in figure.data if t.name == "full copy"][1]
    assert copies.y[-1] == FULL_BYTES * len(publishes)


def test_expert_load_is_relative_to_the_layers_mean(events):
    heat = next(t for t in charts.expert_chart(settle(events)).figure.data if t.type == "heatmap")
    assert all(abs(sum(row) / len(row) - 1) < 1e-9 for row in heat.z)
    assert charts.imbalance([1, 1, 4, 2]) == 2.0
    assert charts.imbalance([0, 0]) is None


def test_expert_load_keeps_its_step_when_few_steps_record_it():
    load = [[3, 1], [2, 2]]
    steps = [dict(event="train_step", phase="rl", step=i, loss=0.0) for i in range(1, 7)]
    for i in (2, 5):
        steps[i]["expert_load"] = load
    _, first_layer, second_layer = charts.expert_chart(steps).figure.data
    assert list(first_layer.x) == [3, 6]
    assert (list(first_layer.y), list(second_layer.y)) == ([1.5, 1.5], [1.0, 1.0])


def test_learning_is_drawn_once_and_time_as_it_was(events):
    rewards = next(t for t in charts.reward_chart(settle(events)).figure.data if "mean" in t.name)
    assert list(rewards.x) == list(range(1, 61))
    throughput = timeline.throughput_chart(events).figure
    assert len(throughput.data[0].x) == WARM_STEPS
    assert len(throughput.data[2].x) == 23 + 40


def test_what_an_engine_held_ends_at_commit_death_and_kill():
    def engine(time_s, what, version=None, name="e"):
        return dict(event="engine", time_s=time_s, engine=name, what=what, version=version)

    events = [
        dict(event="run_start", time_s=0.0),
        engine(1.0, "commit", 0),
        engine(2.0, "generate", 0),
        engine(3.0, "commit", 1),
        engine(3.5, "commit", 1, name="other"),
        engine(5.0, "dead", 1),
        engine(6.0, "replaced"),
        engine(6.5, "commit", 2),
        dict(event="publish", time_s=8.0),
        engine(19.0, "start"),
        dict(event="run_start", time_s=20.0),
        engine(21.0, "commit", 4),
        dict(event="run_end", time_s=22.0),
    ]
    spans = [(s.start_s, s.stop_s, s.label) for s in timeline.held_versions(events, "e")]
    assert spans == [(1, 3, "v0"), (3, 5, "v1"), (6.5, 8, "v2"), (21, 22, "v4")]


def test_phases_are_spans_of_one_attempt(events):
    labels = [s.label for s in timeline.phase_spans(events)]
    assert labels == ["warm start", "RL", "RL"]


def test_marks_of_loss_and_replacement(events):
    names = {
        t.name for t in timeline.timeline_chart(events).figure.data if isinstance(t, go.Scatter)
    }
    assert {"engine dead", "replacement", "checkpoint", "anchor", "delta", "audit: equal"} <= names


def test_quantities():
    assert format_count(9999) == "9,999" and format_count(21_300_000) == "21.3 M"
    assert format_bytes(999) == "999 B" and format_bytes(999_600) == "1 MB"
    assert format_bytes(42_600_000) == "42.6 MB" and format_bytes(5e15) == "5e+03 TB"
    assert format_duration(12.34) == "12.3 s" and format_duration(272) == "4 min 32 s"
    assert format_duration(3725) == "1 h 02 min" and format_duration(59.99) == "60 s"
    assert format_percent(0.01234) == "1.23 %" and format_percent(None) == MISSING
