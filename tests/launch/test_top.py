"""`gossamer top`: the panel, and where the last seconds went; the window forgets."""

import io

import pytest
from gossamer.launch.cli import main
from gossamer.launch.gantt import COLORS
from gossamer.launch.recipe import dump_config, load_recipe
from gossamer.launch.summary import read_events
from gossamer.launch.top import BAR_CELLS, MIN_STEPS, RunTop, Window, share_bar
from rich.console import Console
from synthetic_run import SyntheticRun, write_run


def test_a_whole_run_at_once(tmp_path, capsys):
    write_run(tmp_path)
    assert main(["top", str(tmp_path), "--once"]) == 0
    printed = capsys.readouterr().out
    for words in ("rl-sums", "step 60 of 60", "ended: done", "% waiting", "tokens/s"):
        assert words in printed
    assert "stalled" not in printed
    assert all(what in printed for what in COLORS if what != "fetch and check")
    assert all(len(line) <= 80 and "…" not in line for line in printed.splitlines())


def test_a_run_in_its_warm_start_has_its_panel_alone(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    run.train_step("warm_start", 1, 2.0, 0.0)
    console = Console(file=io.StringIO(), width=80)
    top = RunTop(tmp_path, console)
    top.start()
    top.stop()
    assert "warm_start" in console.file.getvalue() and "waiting" in console.file.getvalue()
    assert "█" not in console.file.getvalue()
    assert "stalled, or killed" in console.file.getvalue()  # its clock is of another year


def test_the_window_holds_seconds_and_at_least_some_steps(tmp_path):
    write_run(tmp_path)
    window = Window()
    for event in read_events(tmp_path):
        window.take(event)
        assert len(window._events) < 400
    steps = [a for a in window.activities() if a.what == "train"]
    assert MIN_STEPS <= len(steps) < 20
    assert window.rates()["engine-0"] == pytest.approx(5200 / 1.1)


def test_bars_are_whole_cells_and_as_long_as_the_shares():
    assert len(share_bar({"rollout": 1 / 3, "apply": 1 / 3, "waiting": 1 / 3})) == BAR_CELLS
    assert len(share_bar({"rollout": 0.5})) == BAR_CELLS / 2


def test_no_run_is_a_sentence(tmp_path, capsys):
    assert main(["top", str(tmp_path)]) == 1
    assert "holds no metrics; expected the folder of a run" in capsys.readouterr().err


def test_a_run_of_replicas_has_a_row_each(tmp_path, capsys):
    dump_config(load_recipe("replicas_laptop", ["replicas=2"]), tmp_path / "config.json")
    fleet = SyntheticRun(tmp_path)
    fleet.add("fleet_start", name="x", replicas=2)
    for number, what in ((0, "restarted"), (1, "finished")):
        SyntheticRun(tmp_path / f"replica-{number}").start(1)
        fleet.add("replica", replica=f"replica-{number}", what=what)
    assert main(["top", str(tmp_path), "--once"]) == 0
    printed = capsys.readouterr().out
    assert "no round settled yet" in printed
    assert "replica-0 starting" in printed and "replica-1 finished" in printed
