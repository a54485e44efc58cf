"""The rollout pool on a real Ray cluster, with engines that fail in every way they can."""

import errno
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
import waiting
from gossamer.comm.codec.part import Rows
from gossamer.comm.config import LogConfig
from gossamer.comm.live import CommitStats
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.rollout import Request, Sample
from gossamer.launch import engine_room
from gossamer.launch.attempts import Attempts
from gossamer.launch.config import PoolConfig, RecoveryConfig, RolloutConfig
from gossamer.launch.engines_cli import places_seen
from gossamer.launch.pool_wishes import Wish, write_wishes
from gossamer.launch.recipe import load_recipe
from gossamer.launch.rollout_pool import RolloutPool
from gossamer.launch.summary import read_events
from ray.util.placement_group import placement_group, remove_placement_group
from tiny_run import events

TESTS = Path(__file__).parent
MODEL = {"pad_token_id": 0, "eos_token_id": 1}
ENDED = {"logprobs": (0.0,), "spans": (), "finished": True}


class FailingEngine:
    """A RolloutEngine that does what the first word of a prompt says; its weights are nothing."""

    def __init__(self, model: dict, log: WeightLog, *, pad_id: int, eos_id: int) -> None:
        self._log, self._model = log, model
        if "broken" in model:
            raise ValueError("model.broken is set; expected a sound model")
        if self._is_first("full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        if self._is_first("stuck"):
            time.sleep(1000)

    def _is_first(self, fault: str) -> bool:
        """Whether the model has it, and no engine before had it."""
        marker = Path(self._log.url, fault)
        is_first = fault in self._model and not marker.exists()
        marker.touch()
        return is_first

    def generate(self, requests: list[Request], is_cut=None) -> list[Sample]:
        for number in (request.prompt_ids[0] for request in requests):
            marker = Path(self._log.url, f"died-{number}")
            if number == 1 or (number == 2 and not marker.exists()):
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 3:
                raise FloatingPointError("logits are not finite")
            if number == 4 and not marker.exists():
                marker.touch()
                time.sleep(1000)
        where = os.getpid(), int(os.environ.get("CUDA_VISIBLE_DEVICES") or -1)
        return [Sample(**ENDED, request_id=r.request_id, token_ids=where) for r in requests]

    def stage(self, version: int) -> None:
        self._version = version
        while version > 0 and Path(self._log.url, "slow").exists():
            time.sleep(0.05)

    def commit(self) -> CommitStats:
        return CommitStats(version=0, pause_s=0.0, num_changed=0)

    def audit(self) -> str:
        if "mortal" in self._model:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._is_first("unreachable"):
            raise OSError("the store is away")
        return self._log.manifest(self._version).state_hash


@pytest.fixture(scope="module")
def cluster():
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        labels={"zone": "a"},
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def publish(tmp_path):
    log = WeightLog.open(tmp_path / "log", create=True)
    publisher = Publisher(log, 0, 1, log.claim_epoch(), LogConfig())

    def publish(step: int) -> None:
        rows = [Rows("a", (4,), 0, torch.full((4,), float(step), dtype=torch.bfloat16))]
        publisher.publish(rows, step)

    publish(0)
    return publish


@pytest.fixture
def build_pool(cluster, publish, tmp_path):
    def build(engines: int, max_failures: int = 5, options=None, **model) -> RolloutPool:
        told = {"engine": "test_rollout_pool:FailingEngine", "engines": engines, "num_cpus": 0}
        rollout = RolloutConfig(**{**told, **(options or {})})
        recovery = RecoveryConfig(max_failures=max_failures, pause_s=0.1)
        built.append(RolloutPool(str(tmp_path), rollout, recovery, {**MODEL, **model}))
        built[-1].open()
        return built[-1]

    built: list[RolloutPool] = []
    yield build
    for pool in built:  # gives its places back
        pool._queue.fail("the test is over")
        for place in pool._places:
            place.thread.join(30)


def requests(*numbers: int) -> list[Request]:
    return [
        Request(request_id=f"r{n}", prompt_ids=(n,), max_new_tokens=1, temperature=1.0, key=(n,))
        for n in numbers
    ]


def test_a_killed_engine_is_replaced_and_its_unit_run_again(build_pool, tmp_path):
    pool = build_pool(2)
    pool.submit("batch", [requests(10, 2), requests(11), requests(12)], 0)
    samples = pool.collect("batch")
    assert [sample.request_id for sample in samples] == ["r10", "r2", "r11", "r12"]
    names = sorted(pool.audit(0))
    assert len(names) == 2 and "engine-2" in names
    assert [e["what"] for e in events(tmp_path, "engine")].count("replaced") == 1


@pytest.mark.parametrize(
    ("prompt", "model", "sentence"),
    [
        (
            1,
            {},
            "no engine is left: engine-1 died: .* 2 without progress",
        ),
        (3, {}, "engine-0 failed: logits are not finite"),
        (10, {"broken": True}, "could not be built: ValueError: model.broken is set"),
    ],
)
def test_a_pool_that_cannot_go_on_says_why(build_pool, prompt, model, sentence):
    pool = build_pool(1, 1, **model)
    pool.submit("batch", [requests(prompt)], 0)
    for wait in (pool.watch, lambda: pool.collect("batch"), lambda: pool.audit(0)):
        with pytest.raises(RuntimeError, match=sentence):
            wait()


@pytest.mark.parametrize(
    ("poison", "reason"),
    [(3, "logits are not finite"), pytest.param(1, "died", marks=pytest.mark.slow)],
)
def test_a_prompt_that_fails_again_and_again_is_left_out(build_pool, tmp_path, poison, reason):
    pool = build_pool(1, 5, {"prompt_retries": 2})
    pool.submit("batch", [requests(10, poison, 11), requests(12)], 0)
    assert [sample.request_id for sample in pool.collect("batch")] == ["r10", "r11", "r12"]
    (lost,) = [e for e in events(tmp_path, "engine") if e["what"] == "prompt_lost"]
    assert lost["request"] == f"r{poison}" and reason in lost["reason"]
    pool.submit("next", [requests(13)], 0)
    assert len(pool.collect("next")) == 1


def test_engines_stop_when_the_trainer_does_not_ask(build_pool, tmp_path):
    pool = build_pool(2, 0, {"max_waiting_samples": 2})
    batches = {f"batch-{b}": [requests(100 * b + u) for u in range(10, 14)] for b in range(3)}
    for name, units in batches.items():
        pool.submit(name, units, 0)

    def sampled() -> int:
        return [e["what"] for e in events(tmp_path, "engine")].count("generate")

    wait_until(lambda: sampled() >= 2 and pool._queue.is_held())
    time.sleep(0.5)
    assert 2 <= sampled() <= 3  # an engine was busy when the bound was met
    # whatever is asked for is sampled, the last first, and what is held back makes room for it
    for name in reversed(batches):
        assert len(pool.collect(name)) == 4
    assert sampled() == 12
    assert any(e["what"] == "held" and e["held_s"] > 0.3 for e in events(tmp_path, "engine"))


def test_an_audit_of_engines_that_always_die_ends(build_pool):
    start_s = time.monotonic()
    with pytest.raises(RuntimeError, match="no engine is left"):
        build_pool(1, 1, mortal=True).audit(0)
    assert time.monotonic() - start_s < 120


wait_until = partial(waiting.wait_until, patience_s=180, every_s=0.05)


def told(run_dir, what: str) -> list[dict]:
    return [event for event in events(run_dir, "engine") if event["what"] == what]


def test_pools_share_a_gpu_wait_for_what_is_not_there_grow_and_shrink(build_pool, tmp_path):
    pools = (
        PoolConfig(name="gpu", engines=2, num_gpus=0.5, labels={"zone": "a"}),
        PoolConfig(name="far", engines=1, num_cpus=0.5, labels={"zone": "b"}),
    )
    pool = build_pool(1, options={"pools": pools})

    def waits(engine: str) -> set[str]:
        """What it waited for; on a busy host it may say so more often."""
        return {e["waits_for"] for e in told(tmp_path, "waits") if e["engine"] == engine}

    wait_until(lambda: len(told(tmp_path, "ready")) == 2 and waits("far-0"))
    assert waits("far-0") == {"0.5 CPUs on a node with zone=b"}
    pool.submit("0", [requests(n) for n in range(10, 30)], 0)
    assert {sample.token_ids[1] for sample in pool.collect("0")} == {0}  # the only GPU
    write_wishes(tmp_path, {"gpu": Wish(engines=3), "far": Wish(engines=0)})
    wait_until(lambda: waits("gpu-2") and told(tmp_path, "left"))
    assert waits("gpu-2") == {"0.5 GPUs on a node with zone=a"}
    assert told(tmp_path, "left")[0]["engine"] == "far-0"
    (tmp_path / "log" / "died-2").touch()
    pool.submit("1", [requests(10), requests(11)], 0)
    assert len(pool.collect("1")) == 2
    write_wishes(tmp_path, {"gpu": Wish(engines=1), "far": Wish(engines=0)})
    wait_until(lambda: len(told(tmp_path, "left")) == 3)
    assert [seen.engine for seen in places_seen(read_events(tmp_path))] == ["gpu-0"]
    assert sorted(pool.audit(0)) == ["gpu-0"]
    # what was given back is there for others
    wait_until(lambda: ray.available_resources().get("GPU") == 0.5)


@pytest.mark.slow
def test_an_engine_that_falls_behind_is_drained_and_another_one_takes_its_unit(
    build_pool, publish, tmp_path
):
    pool = build_pool(1, options={"max_behind": 1})
    wait_until(lambda: told(tmp_path, "ready"))
    (tmp_path / "log" / "slow").touch()
    for step in range(1, 4):
        publish(step)
    pool.submit("0", [requests(10)], 3)
    wait_until(lambda: told(tmp_path, "drained"))
    (tmp_path / "log" / "slow").unlink()
    pool.collect("0")
    (drained,), (anew,) = told(tmp_path, "drained"), told(tmp_path, "reseeded")
    assert re.match("[23] versions behind, rollout.max_behind is 1$", drained["reason"])
    assert (drained["engine"], anew["engine"]) == ("engine-0", "engine-1")
    assert told(tmp_path, "dead") == []


@pytest.mark.slow
def test_an_engine_that_hangs_is_not_waited_for_for_ever(build_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_room, "SILENCE_S", 15.0)
    pool = build_pool(1, options={"num_cpus": 1.0})
    wait_until(lambda: told(tmp_path, "ready"))
    os.kill(int((tmp_path / "pids" / "engine-0").read_text()), signal.SIGSTOP)
    pool.submit("0", [requests(10)], 0)
    assert len(pool.collect("0")) == 1
    (dead,) = told(tmp_path, "dead")
    assert dead["reason"] == "engine-0 has not answered for 15 s"
    assert sorted(pool.audit(0)) == ["engine-1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "options", "reason"),
    [
        ("hang", {"unit_timeout_s": 3.0}, "not sampled a unit in rollout.unit_timeout_s=3"),
        ("stuck", {"start_timeout_s": 15.0}, "not up in rollout.start_timeout_s=15"),
        ("full", {}, "No space left on device"),
        ("unreachable", {}, "the store is away"),
    ],
)
def test_an_engine_that_hangs_or_has_no_disk_is_replaced(
    build_pool, tmp_path, fault, options, reason
):
    pool = build_pool(1, options=options, **{fault: True})
    pool.submit("0", [requests(4 if fault == "hang" else 10)], 0)
    assert len(pool.collect("0")) == 1
    assert len(pool.audit(0)) == 1
    dead = told(tmp_path, "dead")[0]
    assert dead["engine"] == "engine-0" and reason in dead["reason"]


def test_places_of_other_jobs_are_not_taken_for_the_ranks(cluster, tmp_path):
    config = load_recipe("demo", [])
    bundles = [{"memory": 1}] * config.train.parallel.world_size
    others = placement_group(bundles)
    attempts = Attempts(config, tmp_path, 1, lambda: None)
    attempts._others = set(ray.util.placement_group_table())
    assert others.wait(60) and attempts._have_places() is None  # it has not asked
    too_large, ours = placement_group([{"CPU": 9}] * len(bundles)), None
    try:
        assert attempts._have_places() is False
        remove_placement_group(too_large)
        wait_until(lambda: attempts._have_places() is None)
        ours = placement_group(bundles)
        assert ours.wait(60) and attempts._have_places() is True
    finally:
        for group in filter(None, (others, too_large, ours)):
            remove_placement_group(group)


@pytest.mark.slow
def test_a_pool_that_cannot_be_made_says_why(cluster, publish, tmp_path, monkeypatch):
    monkeypatch.setattr("gossamer.launch.attempts._engine_model", lambda config, run_dir: MODEL)
    config = load_recipe("demo", [f"rollout.public_key_path={tmp_path}/missing.pub"])
    attempts = Attempts(config, tmp_path, 1, lambda: None)
    attempts._pool_of_this_attempt()
    wait_until(lambda: ray.wait([attempts._pool_end], timeout=0)[0])
    failure = attempts._pool_failure()
    assert failure.is_final and attempts._pool is None
    assert re.match(
        "the rollout pool could not be made: ValueError: rollout.public_key_path: .*missing.pub is",
        failure.reason,
    )
