"""Pools of servers that run anyway: a real log, stand-ins over real HTTP, no Ray cluster."""

import time
from functools import partial

import pytest
import torch
import waiting
from gossamer.comm.codec.part import Rows
from gossamer.comm.config import LogConfig
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.rollout import Request
from gossamer.launch.config import PoolConfig, RecoveryConfig, RolloutConfig
from gossamer.launch.engines_cli import places_seen
from gossamer.launch.pool_wishes import Wish, write_wishes
from gossamer.launch.rollout_pool import RolloutPool
from gossamer.launch.summary import read_events
from sampling_server import EOS, SamplingServer
from tiny_run import events

MODEL = {"pad_token_id": 0, "eos_token_id": EOS}
PATIENCE_S = 20.0


class Trainer:
    def __init__(self, folder):
        self.log = WeightLog.open(folder, create=True)
        self._publisher = Publisher(self.log, 0, 1, self.log.claim_epoch(), LogConfig())
        self.publish()

    def publish(self):
        step = 0 if (head := self.log.head()) is None else head + 1
        values = torch.full((4,), float(step), dtype=torch.bfloat16)
        self._publisher.publish([Rows("a", (4,), 0, values)], step)


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path / "log")


@pytest.fixture
def serve(trainer):
    begun = []

    def serve(version=0):
        begun.append(SamplingServer(trainer.log.run_id, version))
        return begun[-1]

    yield serve
    for server in begun:
        server.close()


@pytest.fixture
def build(tmp_path):
    built = []

    def build(*servers, **options):
        pools = (PoolConfig(name="far", urls=tuple(server.url for server in servers)),)
        recovery = RecoveryConfig(pause_s=0.1, max_failures=3)
        built.append(
            RolloutPool(str(tmp_path), RolloutConfig(pools=pools, **options), recovery, MODEL)
        )
        built[-1].open()
        return built[-1]

    yield build
    for pool in built:
        pool._queue.fail("the test is over")


def units(*numbers, size=2):
    return [
        [Request(request_id=f"r{n}-{i}", prompt_ids=(n,), max_new_tokens=2, temperature=1.0,
                 key=(n, i)) for i in range(size)]
        for n in numbers
    ]  # fmt: skip


def said(run_dir):
    return [event["what"] for event in events(run_dir, "engine")]


wait_until = partial(waiting.wait_until, patience_s=PATIENCE_S)


def test_a_server_gets_only_units_that_its_version_entitles_it_to(build, serve, trainer, tmp_path):
    first, second = serve(), serve()
    pool = build(first, second)
    wait_until(lambda: said(tmp_path).count("ready") == 2)
    pool.submit("0", units(1, 2, 3, 4), 0)
    assert [s.request_id for s in pool.collect("0")] == [
        f"r{n}-{i}" for n in (1, 2, 3, 4) for i in (0, 1)
    ]
    trainer.publish()
    pool.submit("1", units(5, 6), 1)
    time.sleep(0.3)
    assert len(first.asked) + len(second.asked) == 8
    second.version = 1
    samples = pool.collect("1")
    assert {span.version for s in samples for span in s.spans} == {1}
    generated = [e for e in events(tmp_path, "engine") if e["what"] == "generate"]
    assert [e["version"] for e in generated[-2:]] == [1, 1]


def test_a_server_that_dies_comes_back_empty_and_catches_up_is_used_again(
    build, serve, trainer, tmp_path
):
    server = serve()
    pool = build(server)
    wait_until(lambda: "ready" in said(tmp_path))

    def die(body):
        raise ConnectionError

    server.faults = [die]
    pool.submit("0", units(1, 2), 0)
    assert len(pool.collect("0")) == 4
    assert said(tmp_path).count("dead") == 1
    port = int(server.url.rpartition(":")[2])
    server.close()
    wait_until(lambda: said(tmp_path).count("dead") == 2)
    pool.submit("1", units(3), 0)
    wait_until(lambda: any("refused" in e.get("waits_for", "") for e in events(tmp_path, "engine")))
    server.version = None
    server.begin(port)
    wait_until(lambda: any("bring" in e.get("waits_for", "") for e in events(tmp_path, "engine")))
    server.version = 0
    assert len(pool.collect("1")) == 2
    (seen,) = places_seen(read_events(tmp_path))
    assert (seen.state, seen.version, seen.engine) == ("running", 0, f"127.0.0.1:{port}")


def test_a_server_that_always_fails_is_given_up_and_ends_the_run_if_it_was_the_last(build, serve):
    server = serve()

    def die(body):
        raise ConnectionError

    server.faults = [die] * 100
    pool = build(server)
    pool.submit("0", units(1), 0)
    with pytest.raises(RuntimeError, match="no engine is left: .* failure 4 without progress"):
        pool.collect("0")


def test_a_request_that_a_server_refuses_ends_the_run(build, serve):
    server = serve()
    server.logprobs_mode = "raw_logprobs"
    pool = build(server)
    (unit,) = units(1)
    hot = [Request(request_id="r", prompt_ids=(1,), max_new_tokens=2, temperature=0.5, key=(1,))]
    pool.submit("0", [unit, hot], 0)
    with pytest.raises(RuntimeError, match="failed: .* --logprobs-mode processed_logprobs"):
        pool.collect("0")


def test_a_server_too_far_behind_is_drained_until_it_has_caught_up(build, serve, trainer, tmp_path):
    server = serve()
    pool = build(server, max_behind=2)
    wait_until(lambda: "ready" in said(tmp_path))
    for _ in range(3):
        trainer.publish()
    wait_until(lambda: "drained" in said(tmp_path))
    pool.submit("0", units(1), 0)
    wait_until(lambda: any("from version 0 to 3" in e.get("waits_for", "")
                           for e in events(tmp_path, "engine")))  # fmt: skip
    assert server.asked == []
    server.version = 3
    assert len(pool.collect("0")) == 2
    (drained,) = [e for e in events(tmp_path, "engine") if e["what"] == "drained"]
    assert drained["reason"] == "3 versions behind, rollout.max_behind is 2"
    assert "reseeded" in said(tmp_path)


def test_tokens_older_than_asked_are_not_taken(build, serve, trainer, tmp_path):
    trainer.publish()
    server = serve(1)

    def went_back(body):
        """Its follower found a bit flipped, and loaded an older anchor."""
        spans = [
            {"version": f"{version}@{server.run_id}", "start": at, "end": at + 1}
            for at, version in enumerate((1, 0))
        ]
        return {**server.choice(body), "weight_versions": spans}

    server.faults = [went_back]
    pool = build(server)
    pool.submit("0", units(1), 1)
    samples = pool.collect("0")
    assert {span.version for s in samples for span in s.spans} == {1} and len(server.asked) == 4
    (drained,) = [e for e in events(tmp_path, "engine") if e["what"] == "drained"]
    assert "older than version 1" in drained["reason"]


def test_a_server_of_another_run_of_the_same_recipe_is_not_used(build, serve, tmp_path):
    """Even where it was at a later version, and `/collective_rpc` is not passed on."""
    server = serve(140)
    server.run_id, server.is_dev = "demo-0123456789abcdef", False
    build(server)
    wait_until(lambda: any("labelled '140@demo-0123456789abcdef'" in e.get("waits_for", "")
                           for e in events(tmp_path, "engine")))  # fmt: skip
    assert "ready" not in said(tmp_path)


def test_a_server_that_begins_to_follow_another_run_is_lost(build, serve, trainer, tmp_path):
    first, second = serve(), serve()

    def another(body):
        first.run_id = "another"
        return first.choice(body)

    first.faults = [another]
    pool = build(first, second)
    wait_until(lambda: said(tmp_path).count("ready") == 2)
    pool.submit("0", units(1, 2, 3), 0)
    assert len(pool.collect("0")) == 6
    (dead,) = [e for e in events(tmp_path, "engine") if e["what"] == "dead"]
    assert "labelled '0@another'" in dead["reason"]


def test_versions_that_the_log_does_not_hold_are_not_taken(build, serve, trainer, tmp_path):
    """Its newest files were lost, say, and are being written anew."""
    server = serve(3)
    pool = build(server)
    wait_until(lambda: any("version 3, but the newest of the log is 0" in e.get("waits_for", "")
                           for e in events(tmp_path, "engine")))  # fmt: skip
    server.version = 0
    wait_until(lambda: "ready" in said(tmp_path))
    server.faults = [lambda body: setattr(server, "version", 2)]
    pool.submit("0", units(1), 0)
    wait_until(lambda: "dead" in said(tmp_path))
    server.version = 0
    samples = pool.collect("0")
    assert {span.version for sample in samples for span in sample.spans} == {0}


def test_servers_come_and_go_while_the_run_goes_on(build, serve, tmp_path):
    first, second = serve(), serve()
    pool = build(first)
    wait_until(lambda: "ready" in said(tmp_path))
    write_wishes(tmp_path, {"far": Wish(engines=0, urls=(first.url, second.url))})
    wait_until(lambda: said(tmp_path).count("ready") == 2)
    write_wishes(tmp_path, {"far": Wish(engines=0, urls=(second.url,))})
    wait_until(lambda: "left" in said(tmp_path))
    pool.submit("0", units(1, 2), 0)
    assert len(pool.collect("0")) == 4 and (len(first.asked), len(second.asked)) == (0, 4)
    assert [seen.engine for seen in places_seen(read_events(tmp_path))] == [second.url[7:]]
    (tmp_path / "pools.json").write_text("nonsense")
    wait_until(lambda: events(tmp_path, "lifecycle"))
    assert "not heeded: pools.json" in events(tmp_path, "lifecycle")[0]["why"]
    pool.submit("1", units(3), 0)
    assert len(pool.collect("1")) == 2


def test_an_audit_asks_all_servers_that_may_be_asked(build, serve, tmp_path):
    first, second = serve(), serve()
    first.state_hash, second.is_dev = "ab", False
    pool = build(first, second)
    wait_until(lambda: said(tmp_path).count("ready") == 2)
    assert pool.audit(0) == {first.url[7:]: "ab"}
    assert [e["engine"] for e in events(tmp_path, "engine") if e["what"] == "unaudited"] == [
        second.url[7:]
    ]


def test_a_place_that_was_given_up_comes_back_when_it_is_wished_for_again(build, serve, tmp_path):
    def die(body):
        raise ConnectionError

    sick, sound = serve(), serve()
    sick.faults = [die] * 100
    pool = build(sick, sound)
    for batch in range(60):
        pool.submit(f"{batch}", units(2 * batch + 1, 2 * batch + 2), 0)
        assert len(pool.collect(f"{batch}")) == 4  # the pool is smaller, and goes on
        if "lost" in said(tmp_path):
            break
        time.sleep(0.1)
    (lost,) = [e for e in events(tmp_path, "engine") if e["what"] == "lost"]
    assert lost["engine"] == sick.url[7:] and lost["state"] == "lost"
    assert "failure 4 without progress, of recovery.max_failures=3" in lost["reason"]
    sick.faults = []
    write_wishes(tmp_path, {"far": Wish(engines=0, urls=(sick.url, sound.url))})
    wait_until(lambda: said(tmp_path).count("ready") > 2 and said(tmp_path)[-1] == "ready")
    seen = [(each.engine, each.state) for each in places_seen(read_events(tmp_path))]
    assert seen == [(sound.url[7:], "running"), (sick.url[7:], "running")]
