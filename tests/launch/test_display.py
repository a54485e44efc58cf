"""The live display: what it reads, what it shows in a terminal, what it prints without one."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from gossamer.launch import display
from gossamer.launch.display import EventTail, LiveDisplay, RunState
from gossamer.launch.summary import read_events
from rich.console import Console
from synthetic_run import SyntheticRun, write_run


def shown(run_dir, **console):
    out = io.StringIO()
    live = LiveDisplay(run_dir, Console(file=out, width=100, **console))
    return live, out


def test_lines_are_read_once_and_only_when_whole(tmp_path):
    tail = EventTail(tmp_path)
    assert tail.read() == []
    run = SyntheticRun(tmp_path)
    run.start(1)
    assert [e["event"] for e in tail.read()] == ["pools", "engine", "engine", "run_start"]
    with run.path.open("a") as file:
        file.write('{"event": "run_end", "time_s": 1, ')
    assert tail.read() == []
    with run.path.open("a") as file:
        file.write('"reason": "done"}\nnonsense\n')
    assert [e["event"] for e in tail.read()] == ["run_end"]


def test_state_of_a_whole_run(tmp_path):
    write_run(tmp_path)
    state = RunState()
    for event in read_events(tmp_path):
        state.take(event)
    assert (state.phase, state.steps, state.attempts, state.ended) == ("rl", (60, 60), 2, "done")
    assert state.weights()["trainer"] == state.weights()["engine-1"] == "v64"
    assert state.weights()["sent in all"] == "167 MB (16.6× less)"
    assert state.elapsed_s(1e12) == state.elapsed_s(0.0)


def test_steps_are_counted_within_the_phase_whatever_their_numbers():
    state = RunState()
    for phase, step in [("pretrain", 1), ("pretrain", 2), ("rl", 3), ("rl", 4), ("rl", 3)]:
        state.take({"event": "train_step", "time_s": 0, "phase": phase, "step": step, "loss": 1})
    assert state.steps == (1, None)


def test_a_phase_that_has_begun_is_shown_before_its_first_step():
    state = RunState()
    step = {"event": "train_step", "time_s": 0, "phase": "warm_start", "step": 1, "loss": 1}
    assert state.take(step)
    assert state.take({"event": "phase", "time_s": 0, "phase": "rl"})
    assert (state.phase, state.steps) == ("rl", (0, None))
    assert not state.take({**step, "phase": "rl", "step": 2})
    assert state.steps == (1, None)


def test_an_engine_is_dead_until_another_replaces_it_and_gone_in_the_next_attempt(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    live, _ = shown(tmp_path)

    def engines():
        live.refresh()
        return live._state.engines

    assert engines() == {"engine-0": "starting", "engine-1": "starting"}
    run.publish(1)
    run.commit("engine-0")
    run.add("engine", engine="engine-1", what="dead", version=None)
    assert engines() == {"engine-0": "v0", "engine-1": "dead"}
    run.add("engine", engine="engine-2", what="replaced", version=None)
    assert engines() == {"engine-0": "v0", "engine-2": "starting"}
    run.commit("engine-2")
    run.start(2)
    assert engines() == {"engine-0": "starting", "engine-1": "starting"}
    assert live._state.weights()["engines lost"] == "1"


def test_what_engines_wait_for_is_told_before_anything_else_happened(tmp_path):
    run = SyntheticRun(tmp_path)
    run.add("pools", pools=["engine"])
    waits = {"engine": "engine-0", "what": "waits", "version": None}
    run.add("engine", **waits, waits_for="1 CPU on a node with zone=a")
    live, out = shown(tmp_path)
    live.refresh()
    assert "engine-0 waits for 1 CPU on a node with zone=a" in live._state.line()
    console = Console(file=out, width=100)
    console.print(live._state.panel(0.0))
    assert "waits for 1 CPU" in out.getvalue()
    run.start(1)
    run.publish(1)
    run.commit("engine-0")
    run.add("engine", engine="engine-0", what="drained", version=None, reason="late")
    run.add("engine", engine="engine-1", what="left", version=None)
    live.refresh()
    assert live._state.engines == {"engine-0": "drained"}
    run.add("engine", engine="engine-2", what="reseeded", version=None)
    live.refresh()
    assert live._state.engines == {"engine-2": "starting"}


def test_terminal_panel_shows_the_run(tmp_path):
    write_run(tmp_path)
    live, out = shown(tmp_path, force_terminal=True, color_system=None)
    live.start()
    live.stop()
    text = out.getvalue()
    for words in ("rl-sums", "step 60 of 60", "engine-1", "v64", "16.6× less", "attempt 2", "69.8"):
        assert words in text


def test_terminal_panel_before_the_run_has_begun(tmp_path):
    live, out = shown(tmp_path, force_terminal=True, color_system=None)
    live.start()
    live.stop()
    assert "waiting for the run to start" in out.getvalue()


def test_plain_lines_at_phase_changes_and_evals_only(tmp_path):
    write_run(tmp_path)
    live, out = shown(tmp_path)
    live.start()
    live.stop()
    lines = out.getvalue().splitlines()
    evals, phases, end = 7, 2, 1
    assert len(lines) == evals + phases + end
    assert "\x1b" not in out.getvalue()
    assert re.match(r"\[1 min 20 s\]  rl 1/60  loss .* trainer v0  engine-0 v0", lines[2])
    assert lines[-1].endswith("ended: done")


@pytest.mark.parametrize(("every_s", "lines"), [(0.0, 2), (1e9, 1)])
def test_plain_lines_come_at_their_interval_with_news(tmp_path, monkeypatch, every_s, lines):
    monkeypatch.setattr(display, "PLAIN_EVERY_S", every_s)
    run = SyntheticRun(tmp_path)
    live, out = shown(tmp_path)
    run.train_step("rl", 1, 0.5, 0.0)  # a phase change
    live.refresh()
    run.train_step("rl", 2, 0.4, 0.0)
    live.refresh()
    live.refresh()
    assert len(out.getvalue().splitlines()) == lines


def test_importing_the_display_is_cheap():
    code = "import sys, gossamer.launch.display; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "ray", "rich", "plotly", "numpy"}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_torn_checkpoint_is_told_of(tmp_path, is_terminal):
    run = SyntheticRun(tmp_path)
    run.start(1)
    live, out = shown(tmp_path, force_terminal=is_terminal, no_color=True)
    live.start()
    run.add("checkpoint_torn", step=2, checkpoint="x/step-4", reason="file y is missing")
    live.refresh()
    live.stop()
    said = " ".join(out.getvalue().split())
    assert "resumed from an earlier checkpoint, for file y is missing" in said
