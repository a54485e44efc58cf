"""The demo recipe, cut short, as a job of a Ray cluster of two hosts 100 Mbit/s apart."""

import subprocess
import time

import pytest
from gossamer.launch.testbed import unusable
from ray_hosts import SHARED, ray_hosts
from tiny_run import events

pytestmark = [pytest.mark.testbed, pytest.mark.timeout(600)]
SHORT = ["train.phases.0.max_steps=12", "train.phases.0.warmup_steps=5", "rollout.engines=1"]
SHORT += ["train.phases.1.max_steps=3", "train.phases.1.warmup_steps=1"]
# an engine of two CPUs fits the second host alone, so a rank must go to the first
CPUS, SPREAD = [1, 3], ["rollout.num_cpus=2"]
ROLES = ("driver", "rank-0", "rank-1", "engine-0")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """(cluster, what its hosts see at SHARED)."""
    if reason := unusable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("two")
    (shared := folder / "shared").mkdir()
    with ray_hosts(folder, CPUS, mbit=100, shared=shared) as cluster:
        cluster.start(0)
        cluster.start(1)
        yield cluster, shared


@pytest.mark.parametrize("sent_by", ["gossamer submit", "ray job submit -- gossamer rl"])
def test_the_demo_runs_on_two_hosts(two_hosts, sent_by):
    cluster, shared = two_hosts
    run = sent_by.split()[0]
    words = [*sent_by.split(), "demo", *SHORT, *SPREAD, "--run-dir", f"{SHARED}/{run}"]
    carried = cluster.carried(1)
    sent = subprocess.Popen(
        cluster.command(0, *words), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    pids = [shared / run / "pids" / role for role in ROLES]
    while sent.poll() is None and not all(path.exists() for path in pids):
        time.sleep(0.2)
    where = {path.name: cluster.where(int(path.read_text())) for path in pids if path.exists()}
    printed, _ = sent.communicate(timeout=400)
    assert sent.returncode == 0, printed
    assert (where["driver"], where["engine-0"]) == (0, 1)
    assert {where["rank-0"], where["rank-1"]} == {0, 1}
    assert "equal the trainer's bit for bit" in printed
    assert len(events(shared / run, "publish")) == 4
    # gradients of every update crossed the link, and of a million parameters at least
    (start,) = events(shared / run, "run_start")
    num_updates = len(events(shared / run, "train_step"))
    assert num_updates == 15
    assert cluster.carried(1) - carried > num_updates * start["params"]
