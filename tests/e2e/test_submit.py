"""A run as a job of a Ray cluster: sent, watched, stopped, found again, resumed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import SETTINGS, events

TESTS = Path(__file__).parent.parent
PATIENCE_S = 300


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of the dashboard of a Ray head of our own, with four logical CPUs."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, agent_port = probe.getsockname()[1], other.getsockname()[1]
    ray = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=4"]
    ray += ["--port=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    # jobs go through the agent, whose usual port belongs to any other cluster of this machine
    ray += [f"--dashboard-agent-listen-port={agent_port}"]
    # unix sockets have short names; workers import tiny_run's reward
    folder = Path("/tmp") / f"gossamer-ray-{os.getpid()}"
    paths = {"PYTHONPATH": str(TESTS), "PATH": f"{ray[0].parent}:{os.environ['PATH']}"}
    with (tmp_path_factory.mktemp("head") / "head.log").open("w") as log:
        head = subprocess.Popen(
            [*ray, f"--temp-dir={folder}"],
            env={**os.environ, **paths, "RAY_JOB_STOP_WAIT_TIME_S": "30"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + PATIENCE_S
        try:
            while (said := gossamer(f"http://127.0.0.1:{port}", "status")).returncode:
                assert head.poll() is None and time.monotonic() < deadline_s, said.stderr
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            head.terminate()  # with --block it ends what it started
            head.wait(timeout=90)
            shutil.rmtree(folder, ignore_errors=True)


def gossamer(address: str, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gossamer.launch.cli", *map(str, words)]
    return subprocess.run([*command, "--address", address], capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_is_sent_watched_stopped_found_and_resumed(cluster, tmp_path):
    warm, rl = SETTINGS["phases"]
    recipe, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    train = {**SETTINGS, "phases": [warm, {**rl, "max_steps": 4000}]}
    recipe.write_text(json.dumps({"name": "tiny", "train": train, "rollout": {"engines": 1}}))
    sent = gossamer(cluster, "submit", recipe, "--run-dir", run_dir, "--detach")
    assert sent.returncode == 0, sent.stderr
    watched = subprocess.Popen(
        [sys.executable, "-m", "gossamer.launch.cli", "logs", "tiny", "--address", cluster],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + PATIENCE_S
    while not (run_dir / "metrics.jsonl").exists() or len(events(run_dir, "checkpoint")) < 5:
        assert time.monotonic() < deadline_s, gossamer(cluster, "status", "tiny").stdout
        time.sleep(0.5)
    status = gossamer(cluster, "status", "tiny").stdout
    assert "RUNNING" in status and str(run_dir) in status
    for role in ("driver", "rank-1", "engine-0"):  # the wheel that was sent comes first
        process = Path("/proc") / (run_dir / "pids" / role).read_text()
        (found,) = (
            v for v in process.joinpath("environ").read_text().split("\0") if "PYTHONPATH" in v
        )
        assert "py_modules_files" in found.partition(str(TESTS))[0], found
    watched.send_signal(2)  # Ctrl-C: it detaches, and the run goes on
    printed, said = watched.communicate(timeout=PATIENCE_S)
    assert (watched.returncode, "warm_start" in printed) == (0, True), (printed, said)
    assert "detached; it goes on" in said
    assert "RUNNING" in gossamer(cluster, "status").stdout

    stopped = gossamer(cluster, "stop", "tiny")
    assert "STOPPED" in stopped.stdout and f"submit --resume {run_dir}" in stopped.stdout
    assert events(run_dir, "run_end")[-1]["reason"] == "stopped by its user"
    assert "has ended already" in gossamer(cluster, "stop", "tiny").stderr

    config = json.loads((run_dir / "config.json").read_text())
    last = events(run_dir, "checkpoint")[-1]["step"]
    config["train"]["phases"][1]["max_steps"] = last - warm["max_steps"] + 1
    (run_dir / "config.json").write_text(json.dumps(config))
    resumed = gossamer(cluster, "submit", "--resume", run_dir, "rollout.engines=2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert events(run_dir, "run_end")[-1]["reason"] == "finished"
    assert events(run_dir, "run_start")[-1]["attempt"] == 2
    assert "equal the trainer's bit for bit" in resumed.stdout
    assert {e["engine"] for e in events(run_dir, "audit")} == {"engine-0", "engine-1"}
    assert (run_dir / "report.html").exists()


@pytest.mark.slow
def test_what_fails_there_is_told_here(cluster, tmp_path):
    """By a plain Ray job as well: `ray job submit -- gossamer rl RECIPE`."""
    unknown = gossamer(cluster, "logs", "nowhere")
    assert unknown.returncode == 1 and "nowhere is no run of" in unknown.stderr
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps({"name": "full", "train": SETTINGS}))
    failed = gossamer(cluster, "submit", recipe, "--run-dir", tmp_path)
    assert failed.returncode == 1
    assert "already holds a run" in failed.stdout
    ray = Path(sys.executable).parent / "ray"
    words = ["job", "submit", "--address", cluster, "--", ray.parent / "gossamer", "rl", recipe]
    # Ray's own command takes a token that lies about only when it is told to
    has_token = (Path.home() / ".ray" / "auth_token").is_file()
    plain = subprocess.run(
        [ray, *words, "--run-dir", tmp_path],
        env={**os.environ, **({"RAY_AUTH_MODE": "token"} if has_token else {})},
        capture_output=True,
        text=True,
    )
    assert plain.returncode == 1 and "already holds a run" in plain.stdout + plain.stderr
