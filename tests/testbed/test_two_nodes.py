"""The demo recipe, cut short, as a job of a Ray cluster of two hosts 100 Mbit/s apart."""

import re
import subprocess
import sys
import time

import pytest
from gossamer.launch.testbed import unusable
from ray_hosts import SHARED, ray_hosts
from s3_server import KEYS
from tiny_run import events

pytestmark = [pytest.mark.testbed, pytest.mark.timeout(600)]
SHORT = ["train.phases.0.max_steps=12", "train.phases.0.warmup_steps=5", "rollout.engines=1"]
SHORT += ["train.phases.1.max_steps=3", "train.phases.1.warmup_steps=1"]
# of two CPUs each, one rank fits a host, and beside it on the second the engine
CPUS, ENGINE = [2, 3], ["rollout.labels.host=host-1"]
APART, ON_THE_HEAD = ["cluster.cpus_per_rank=2"], ["cluster.labels.host=host-0"]
WIRE = ("versions", "wire_bytes", "full_bytes")
S3_PORT, CACHE = 9000, "gossamer"
BUCKET = """
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], b"", method="PUT")).close()
"""


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """(cluster, what its hosts see at SHARED), with an S3 server on the head's host."""
    if reason := unusable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("two")
    (shared := folder / "shared").mkdir()
    with ray_hosts(folder, CPUS, mbit=100, shared=shared) as cluster:
        head = cluster.hosts[0].address
        s3 = {**KEYS, "AWS_ENDPOINT_URL": f"http://{head}:{S3_PORT}"}
        cluster.environment |= {**s3, "GOSSAMER_CACHE": f"/tmp/{CACHE}"}
        server = cluster.command(0, sys.executable, "-m", "s3_server", head, S3_PORT)
        with subprocess.Popen(server, stdout=subprocess.PIPE) as serving:
            assert serving.stdout.readline()
            url = f"{cluster.environment['AWS_ENDPOINT_URL']}/bucket"
            assert cluster.call(0, sys.executable, "-c", BUCKET, url).returncode == 0
            cluster.start(0)
            cluster.start(1)
            yield cluster, shared
            serving.kill()


def run_demo(cluster, words, folders):
    """(what it printed, host by role, bytes over the link); folders: where a host leaves pids."""
    carried = cluster.carried(1)
    sent = subprocess.Popen(
        cluster.command(0, *words), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    where = {}
    while sent.poll() is None:
        for path in (path for folder in folders for path in folder.rglob("pids/*")):
            pid = path.read_text()
            if path.name not in where and pid and (host := cluster.where(int(pid))) is not None:
                where[path.name] = host
        time.sleep(0.2)
    printed = sent.stdout.read()
    assert sent.returncode == 0, printed
    assert "equal the trainer's bit for bit" in printed
    return printed, where, cluster.carried(1) - carried


def test_the_ranks_of_a_submitted_run_are_on_two_hosts(two_hosts):
    cluster, shared = two_hosts
    words = ["gossamer", "submit", "demo", *SHORT, *ENGINE, *APART, "--run-dir", f"{SHARED}/run"]
    _, where, carried = run_demo(cluster, words, [shared / "run"])
    assert (where["driver"], where["engine-0"]) == (0, 1)
    assert {where["rank-0"], where["rank-1"]} == {0, 1}
    assert len(events(shared / "run", "publish")) == 4
    # gradients of every update crossed the link, two bytes a parameter at the very least
    (start,) = events(shared / "run", "run_start")
    num_updates = len(events(shared / "run", "train_step"))
    assert num_updates == 15 and carried > num_updates * 2 * start["params"]


def test_weights_of_a_plain_job_cross_the_link_by_a_bucket(two_hosts):
    cluster, _ = two_hosts
    run = ["--run-dir", "s3://bucket/run"]
    words = ["ray", "job", "submit", "--", "gossamer", "rl", "demo", *SHORT, *ENGINE, *ON_THE_HEAD]
    folders = [cluster.own(i) / CACHE for i in (0, 1)]
    printed, where, carried = run_demo(cluster, [*words, *run], folders)
    assert {where[role] for role in ("driver", "rank-0", "rank-1")} == {0}
    assert where["engine-0"] == 1
    told = {name: int(re.search(rf"{name} +(\d+)", printed)[1]) for name in WIRE}
    # all versions of the log, and what Ray says, but less than whole copies
    assert told["versions"] == 4 and told["wire_bytes"] < carried < told["full_bytes"]
