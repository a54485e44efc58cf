"""A place whose node dies is made again on another one: a Ray cluster of several raylets."""

import os
from pathlib import Path

import pytest
import ray
from gossamer.comm.rollout import Request
from gossamer.launch.config import PoolConfig, RecoveryConfig, RolloutConfig
from gossamer.launch.engine_room import wanted_words
from gossamer.launch.engines_cli import places_seen
from gossamer.launch.rollout_pool import RolloutPool
from gossamer.launch.summary import read_events
from test_rollout_pool import MODEL, publish, told, wait_until  # noqa: F401

TESTS = Path(__file__).parent


def test_what_is_waited_for_in_words():
    pool = PoolConfig(name="far", labels={"zone": "a", "gpu": "!h100"})
    assert wanted_words({"CPU": 1.0, "GPU": 0.5}, pool) == (
        "1 CPU and 0.5 GPUs on a node with zone=a, gpu=!h100"
    )
    assert wanted_words({}, PoolConfig(name="far")) == "room"


@pytest.mark.slow
def test_a_place_whose_node_died_is_made_again_elsewhere(tmp_path, publish):  # noqa: F811
    from ray.cluster_utils import Cluster

    pools = (PoolConfig(name="near", engines=1, labels={"zone": "a"}),)
    rollout = RolloutConfig(engine="test_rollout_pool:FailingEngine", pools=pools)
    pool = RolloutPool(str(tmp_path), rollout, RecoveryConfig(pause_s=0.1), MODEL)

    def answers(number: int) -> None:
        asked = Request(
            request_id="r", prompt_ids=(number,), max_new_tokens=1, temperature=1.0, key=(1,)
        )
        pool.submit(f"{number}", [[asked]], 0)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        first = cluster.add_node(num_cpus=1, labels={"zone": "a"})
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
        )
        pool.open()
        answers(10)
        assert len(pool.collect("10")) == 1
        cluster.remove_node(first, allow_graceful=False)
        # the first one may have waited for its place, too
        wait_until(lambda: any(e["engine"] != "near-0" for e in told(tmp_path, "waits")))
        assert told(tmp_path, "waits")[-1]["waits_for"] == "1 CPU on a node with zone=a"
        cluster.add_node(num_cpus=1, labels={"zone": "b"})
        cluster.add_node(num_cpus=1, labels={"zone": "a"})
        answers(11)
        assert len(pool.collect("11")) == 1
        (seen,) = places_seen(read_events(tmp_path))
        assert seen.state == "running" and seen.engine != "near-0" and told(tmp_path, "dead")
    finally:
        pool._queue.fail("the test is over")
        for place in pool._places:  # a thread that asks Ray after its end would start another
            place.thread.join(30)
        ray.shutdown()
        cluster.shutdown()
