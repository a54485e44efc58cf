"""A run whose folder is a bucket, on two Ray nodes that share nothing else: its driver is killed,
and one on another host goes on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from gossamer.comm.log import WeightLog
from gossamer.comm.reader import read_state
from gossamer.comm.store import open_store
from gossamer.launch.cli import main
from gossamer.launch.summary import Event, of_kind, read_events
from gossamer.trainer.metrics import has_events
from gossamer.trainer.run_folder import CACHE_VARIABLE, inside, open_run
from s3_server import KEYS, S3Server
from tiny_run import SETTINGS
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATIENCE_S = 300
RUN = "s3://bucket/runs/tiny"
SECRET = "the-key-of-the-bucket"


def environment(host: Path, port: int) -> dict[str, str]:
    """Of a process on that host."""
    return {
        **os.environ,
        **KEYS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        CACHE_VARIABLE: str(host),
        "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",  # without it a node does not show the head's token
        "RAY_AUTH_TOKEN": "of-this-test",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def cluster(caches: list[Path], bucket_port: int):
    """Address of a head and its other nodes, two logical CPUs and a cache each."""
    address = f"127.0.0.1:{free_port()}"
    folder = Path("/tmp") / f"gossamer-ray-{os.getpid()}"  # unix sockets have short names
    port, dashboard_port = address.partition(":")[2], free_port()
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard_port}"]
    head += ["--include-dashboard=false"]
    nodes: list[subprocess.Popen] = []
    try:
        for place, cache in enumerate(caches):
            words = [*(head if place == 0 else [f"--address={address}"]), "--block", "--num-cpus=2"]
            words += ["--node-ip-address=127.0.0.1"] + [f"--temp-dir={folder}"] * (place == 0)
            with (cache.parent / f"{cache.name}.log").open("w") as log:
                nodes.append(
                    subprocess.Popen(
                        [BIN / "ray", "start", *words],
                        env=environment(cache, bucket_port),
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
            while "Ray runtime started" not in (cache.parent / f"{cache.name}.log").read_text():
                assert nodes[-1].poll() is None, (cache.parent / f"{cache.name}.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()  # with --block it ends what it started
            node.wait(timeout=90)
        shutil.rmtree(folder, ignore_errors=True)


class Command:
    """`gossamer WORDS` on a host."""

    def __init__(self, host: Path, port: int, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gossamer.launch.cli", *map(str, words)],
            env=environment(host, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def printed(self, code: int = 0) -> str:
        said, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == code, said
        return said


def wait_for(run_dir: Path, command: Command, kind: str, **fields: object) -> list[Event]:
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        assert command.process.poll() is None, command.process.communicate()[0]
        if has_events(run_dir) and of_kind(found := read_events(run_dir), kind, **fields):
            return found
        time.sleep(0.5)
    raise AssertionError(f"no {kind} {fields} in {RUN}")


@pytest.fixture
def server():
    server = S3Server()
    server.put("bucket")
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_and_three_drivers_share_only_a_bucket(tmp_path, server, monkeypatch, capsys):
    for name, value in environment(tmp_path / "reader", server.port).items():
        monkeypatch.setenv(name, value)
    warm, rl = SETTINGS["phases"]
    phases = [{**warm, "max_steps": 2}, {**rl, "max_steps": 10}]
    # the server shares the machine with the run
    train = {**SETTINGS, "phases": phases, "log": {"poll_s": 0.2}}
    recipe, caches = tmp_path / "tiny.json", [tmp_path / "node-0", tmp_path / "node-1"]
    recipe.write_text(json.dumps({"name": "tiny", "train": train, "rollout": {"engines": 2}}))
    with cluster(caches, server.port) as address:
        where = ["--run-dir", RUN, f"cluster.address={address}"]
        first = Command(tmp_path / "driver-1", server.port, "rl", recipe, *where)
        while open_store(RUN).size("config.json") is None:
            assert first.process.poll() is None, first.printed()
            time.sleep(0.2)
        run_dir = open_run(RUN)
        before = wait_for(run_dir, first, "train_step", step=3)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        resumed = Command(tmp_path / "driver-2", server.port, "resume", RUN, where[-1]).printed()
    assert "equal the trainer's bit for bit" in resumed and f"report: {RUN}/report.html" in resumed
    check_history(run_dir, before)

    # each node worked in its own folder alone, and nobody made a file of events
    roles = [{path.name for path in cache.glob("runs/*/*/pids/*")} for cache in caches]
    assert {"rank-0", "rank-1", "engine-0", "engine-1"} <= roles[0] | roles[1]
    assert all(any(role.startswith(("rank", "engine")) for role in each) for each in roles)
    assert list(tmp_path.rglob("metrics.jsonl")) == []

    # from a host that has seen nothing of it yet
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "watcher"))
    for code, words, expected in (
        (0, ["top", RUN, "--once"], "ended: finished"),
        (0, ["report", RUN], f"{RUN}/report.html"),
        (0, ["export", RUN, str(tmp_path / "hf")], "hf"),
        (1, ["resume", RUN], f"{RUN} has finished; see `gossamer report {RUN}`"),
        (1, ["rl", str(recipe), *where], f"{RUN} already holds a run: continue it with `gossamer"),
    ):
        assert main(words) == code
        printed = capsys.readouterr()
        assert expected in printed.out + printed.err
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    embedding = read_state(WeightLog.open(inside(run_dir, "log")))["model.embed_tokens.weight"]
    assert exported["model.embed_tokens.weight"].equal(embedding)
    check_secrets(tmp_path)


def check_history(run_dir: Path, before: list[Event]) -> None:
    """What was seen before the kill is there, and what was done again is the same."""
    after = read_events(run_dir)
    for kind in ("train_step", "publish"):
        assert [e for e in of_kind(before, kind) if e not in after] == []
    steps: dict[int, set[tuple[float, float]]] = {}
    for event in of_kind(after, "train_step"):
        steps.setdefault(event["step"], set()).add((event["loss"], event["grad_norm"]))
    assert sorted(steps) == list(range(1, 13)) and all(len(each) == 1 for each in steps.values())
    log = WeightLog.open(inside(run_dir, "log"))
    writers = [log.manifest(version).writer_epoch for version in range(log.head() + 1)]
    assert writers == sorted(writers) and set(writers) == {1, 2}
    summary = json.loads(open_store(RUN).get("summary.json"))
    assert summary["engines_bit_exact"] and (summary["attempts"], summary["steps"]) == (2, 12)
    assert open_store(RUN).size("report.html") > 1_000_000


def check_secrets(hosts: Path) -> None:
    """The bucket's key is in no file of any host, and in none of the run's."""
    found = [path for path in hosts.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in found if SECRET.encode() in path.read_bytes()] == []
    store = open_store(RUN)
    for folder in ("", "metrics/", "log/"):
        assert not any(SECRET.encode() in store.get(name) for name in store.list(folder))
