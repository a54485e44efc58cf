"""Replicas as a user runs them: links, a joiner, a kill of one and of the supervisor, a resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from gossamer.comm.outer.record import record_name, unpack_record
from gossamer.comm.store import open_store
from tiny_run import SETTINGS, events

STEPS, INNER_STEPS = 160, 4
NAMES = {"replica-0", "replica-1", "replica-2"}


def write_recipe(folder):
    train = SETTINGS | {
        "phases": [{"name": "text", "kind": "next_token", "max_steps": STEPS, "lr": 0.005}],
        "data": SETTINGS["data"] | {"num_replicas": 4},
        "parallel": {"expert": 1},
        "checkpoint": {"every_steps": 2 * INNER_STEPS, "keep_last": 2},
        # three are waited for whatever happens, so that the test does not depend on its machine
        "outer": {
            "inner_steps": INNER_STEPS,
            "expected_replicas": 3,
            "quorum": 3,
            "deadline_s": 400.0,
            "anchor_every_rounds": 5,
        },
    }
    recipe = {"name": "tiny", "replicas": 2, "fleet": {"link_mbit": 100}, "train": train}
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture
def gossamer():
    """A function that starts one, which does not outlive the test."""
    started = []

    def start(printed, *words):
        command = [sys.executable, "-m", "gossamer.launch.cli", *map(str, words)]
        with printed.open("a") as file:
            started.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        process.kill()  # nothing happens to one that is over
        process.wait()


def until(what, process, printed, timeout_s=300):
    """What `what()` returns, once it is something."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := what()):
        assert process is None or process.poll() is None, printed.read_text()
        assert time.monotonic() < deadline_s, printed.read_text()
        time.sleep(0.05)
    return found


def pid_in(path, process, printed):
    return until(lambda: path.exists() and path.read_text(), process, printed)


def is_running(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # of a zombie there is none
    except OSError:
        return False


def records_of(store):
    names = (record_name(number) for number in range(10_000))
    found = []
    for name in names:
        if store.size(name) is None:
            return found
        found.append(unpack_record(store.get(name), name))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_a_joiner_and_a_resume_leave_replicas_that_are_bit_equal(tmp_path, gossamer):
    run_dir, printed, joined = tmp_path / "run", tmp_path / "printed", tmp_path / "joined"
    first = gossamer(printed, "train", write_recipe(tmp_path), "--run-dir", run_dir)
    until((run_dir / "rounds/members/00001.json").exists, first, printed)
    told = until(
        lambda: re.search(r"gossamer join (http://\S+)", printed.read_text()), first, printed
    )
    url = told[1]
    third = gossamer(tmp_path / "third", "join", url, "--run-dir", joined)
    store = open_store(run_dir / "rounds")

    until(lambda: len(records_of(store)) > 2, first, printed)
    os.kill(int(pid_in(run_dir / "replica-1/pids/rank-0", first, printed)), signal.SIGKILL)
    until(lambda: {e.incarnation for e in records_of(store)[-1].counted} > {1}, first, printed)
    left = {path.read_text() for path in run_dir.glob("replica-*/pids/*")}
    first.kill()
    first.wait()

    # its links are gone with it: the joiner waits, and goes on by the folder itself
    third.send_signal(signal.SIGINT)
    third.wait(300)
    until(lambda: not any(is_running(pid) for pid in left), None, printed)
    again = gossamer(printed, "resume", run_dir)
    third = gossamer(tmp_path / "third", "resume", joined, f"train.outer.url={run_dir / 'rounds'}")
    assert again.wait(400) == 0, printed.read_text()
    assert third.wait(300) == 0, (tmp_path / "third").read_text()

    records = records_of(store)
    assert len(records) == STEPS // INNER_STEPS
    assert all({e.replica for e in r.counted} == NAMES for r in records)
    assert max(e.incarnation for e in records[-1].counted) >= 3
    for name in NAMES:
        counted = [e for record in records for e in record.counted if e.replica == name]
        for before, after in pairwise(counted):
            assert before.tokens_before + before.tokens <= after.tokens_before, name
    hashes = {}
    for folder in (run_dir / "replica-0", run_dir / "replica-1", joined):
        for event in events(folder, "outer_round"):
            hashes.setdefault(event["next_round"], set()).add(event["state_hash"])
    assert all(len(found) == 1 for found in hashes.values())
    assert len(hashes) == len(records)

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["hashes_equal"] is True and summary["joined"] == ["replica-2"]
    assert (
        "replica-1 the process of trainer rank 0 was killed or crashed; started again in 1 s"
        in (printed.read_text())
    )
    assert (run_dir / "report.html").stat().st_size > 1_000_000
