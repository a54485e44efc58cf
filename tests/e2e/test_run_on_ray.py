"""The gossamer command on a real Ray cluster: a whole run, and one in which things are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gossamer.comm.log import WeightLog
from gossamer.comm.names import logical_views
from gossamer.comm.reader import read_state
from tiny_run import SETTINGS, events
from transformers import AutoModelForCausalLM, AutoTokenizer

TESTS = Path(__file__).parent.parent
PATIENCE_S = 300
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # nothing happens to one that is over
        process.wait()


def write_recipe(folder: Path, **changes: object) -> Path:
    path, train = folder / "tiny.yaml", {**SETTINGS, **changes}
    path.write_text(json.dumps({"name": "tiny", "train": train, "rollout": {"engines": 2}}))
    return path


def gossamer(*words: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}  # workers import tiny_run's reward
    command = [sys.executable, "-m", "gossamer.launch.cli", *map(str, words)]
    STARTED.append(
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    )
    return STARTED[-1]


def finish(process: subprocess.Popen, expected_code: int) -> str:
    printed, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == expected_code, printed
    return printed


def wait_for(run_dir: Path, process: subprocess.Popen, event: str, **fields: object) -> None:
    """Until the run has written such an event."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, process.communicate()[0]
        if (run_dir / "metrics.jsonl").exists():
            for found in events(run_dir, event):
                if fields.items() <= found.items():
                    return
        time.sleep(0.05)
    raise AssertionError(f"no {event} {fields} in {run_dir}")


def kill(run_dir: Path, role: str) -> None:
    os.kill(int((run_dir / "pids" / role).read_text()), signal.SIGKILL)


def test_a_whole_run_from_the_command_line(tmp_path):
    run_dir = tmp_path / "run"
    printed = finish(gossamer("rl", write_recipe(tmp_path), "--run-dir", run_dir), 0)
    assert "equal the trainer's bit for bit" in printed
    assert str(run_dir / "report.html") in printed
    assert "deepspeed" not in printed.lower() and "raylet" not in printed.lower()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["engines_bit_exact"] is True
    assert (summary["versions"], summary["steps"], summary["ep_size"]) == (6, 11, 2)
    assert 0 < summary["wire_bytes"] < summary["full_bytes"]
    assert (run_dir / "report.html").stat().st_size > 1_000_000
    refused = finish(gossamer("rl", write_recipe(tmp_path), "--run-dir", run_dir), 1)
    assert "already holds a run" in refused
    assert "has finished" in finish(gossamer("resume", run_dir), 1)
    finish(gossamer("export", run_dir, tmp_path / "hf"), 0)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    published = read_state(WeightLog.open(run_dir / "log"))
    loaded = logical_views(exported.named_parameters())
    assert loaded.keys() == published.keys()
    for name, tensor in published.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name].view(torch.int16), tensor.view(torch.int16)), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("42 - 25 =").input_ids) == "42 - 25 ="


def test_a_run_on_text_alone_needs_no_engines(tmp_path):
    recipe = write_recipe(tmp_path, phases=SETTINGS["phases"][:1])
    printed = finish(gossamer("train", recipe, "--run-dir", tmp_path / "run"), 0)
    assert "bit for bit" not in printed and "DIFFER" not in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["versions"]) == (6, 0)
    assert summary["engines_bit_exact"] is None
    losses = [event["loss"] for event in events(tmp_path / "run", "train_step")]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.timeout(900)  # three runs, beside another file of slow tests
def test_killed_engine_rank_and_driver_leave_the_run_that_was_never_killed(tmp_path):
    warm, rl = SETTINGS["phases"]
    # it must not be over before it is killed
    recipe = write_recipe(tmp_path, phases=[warm, {**rl, "max_steps": 16}])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(gossamer("rl", recipe, "--run-dir", whole), 0)

    first = gossamer("rl", recipe, "--run-dir", killed)
    wait_for(killed, first, "publish", version=1)
    kill(killed, "engine-0")
    wait_for(killed, first, "engine", what="replaced")
    wait_for(killed, first, "train_step", step=9)
    kill(killed, "rank-1")
    wait_for(killed, first, "run_start", attempt=2)  # by itself
    log = WeightLog.open(killed / "log")
    while log.manifest(log.head()).writer_epoch < 2:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.kill()
    first.wait()

    finish(gossamer("resume", killed), 0)
    whys = [event["why"] for event in events(killed, "lifecycle") if event["why"]]
    assert whys == ["the process of trainer rank 1 was killed or crashed; started again in 1 s"]
    logs = [WeightLog.open(folder / "log") for folder in (whole, killed)]
    states = [read_state(log) for log in logs]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.equal(states[1][name]), name
    writers = [logs[1].manifest(v).writer_epoch for v in range(logs[1].head() + 1)]
    assert writers == sorted(writers) and set(writers) == {1, 2, 3}
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["engines_bit_exact"] and summary["attempts"] == 3
    rewards = {e["step"]: e["reward_mean"] for e in events(whole, "train_step") if e["step"] > 6}
    for event in events(killed, "train_step"):
        assert event["step"] <= 6 or event["reward_mean"] == rewards[event["step"]]
