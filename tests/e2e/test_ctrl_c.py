"""Ctrl-C in a terminal: one sentence, exit code 130, no process left, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_run import SETTINGS, events

TESTS = Path(__file__).parent.parent
PATIENCE_S = 300


def descendants(process: int) -> set[int]:
    """Processes below one, zombies apart."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if words[0] != "Z":
            parents[int(path.parent.name)] = int(words[1])
    found, new = set(), {process}
    while new := {child for child, parent in parents.items() if parent in new}:
        found |= new
    return found


@pytest.mark.slow
def test_ctrl_c_ends_everything_and_a_second_driver_is_refused(tmp_path):
    recipe, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    warm, rl = SETTINGS["phases"]
    # it must not be over before it is stopped
    train = {**SETTINGS, "phases": [warm, {**rl, "max_steps": 4000}]}
    recipe.write_text(json.dumps({"name": "tiny", "train": train, "rollout": {"engines": 1}}))
    gossamer = [sys.executable, "-m", "gossamer.launch.cli"]
    running = subprocess.Popen(
        [*gossamer, "rl", recipe, "--run-dir", run_dir],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's foreground: the signal goes to all of it
    )
    try:
        check_ctrl_c(running, gossamer, run_dir)
    finally:
        for process in descendants(running.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        running.kill()
        running.wait()


def check_ctrl_c(running: subprocess.Popen, gossamer: list[str], run_dir: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (run_dir / "metrics.jsonl").exists() or not events(run_dir, "train_step"):
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    second = subprocess.run([*gossamer, "resume", run_dir], capture_output=True, text=True)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"gossamer: {run_dir} is being run by another gossamer process\n"

    below = descendants(running.pid)
    assert len(below) > 4  # Ray's own, two ranks, an engine
    os.killpg(running.pid, signal.SIGINT)
    printed, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130
    last = printed.splitlines()[-1]
    assert last == f"gossamer: stopped; `gossamer resume {run_dir}` goes on"
    assert "Traceback" not in printed
    deadline_s = time.monotonic() + 120
    while left := {process for process in below if Path(f"/proc/{process}").exists()}:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)
    assert events(run_dir, "run_end")[-1]["reason"] == "stopped by its user"
