"""What goes wrong at one server of a pool is told, and ends no run that others go on with."""

# ruff: noqa: F401, F811  # fixtures
import time

import pytest
from gossamer.launch import pool_place, server_room
from gossamer.launch.config import PoolConfig, RecoveryConfig, RolloutConfig
from gossamer.launch.engines_cli import places_seen
from gossamer.launch.pool_wishes import Wish, write_wishes
from gossamer.launch.rollout_pool import RolloutPool
from gossamer.launch.server_room import ServerEngine
from gossamer.launch.summary import read_events
from test_rollout_servers import (
    MODEL,
    build,
    said,
    serve,
    trainer,
    units,
    wait_until,
)
from tiny_run import events


def told(run_dir, what):
    return [event for event in events(run_dir, "engine") if event["what"] == what]


def test_an_audit_of_a_server_that_stays_behind_ends(
    build,
    serve,
    trainer,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(server_room, "AUDIT_PATIENCE_S", 0.3)
    first, second = serve(), serve()
    first.state_hash = second.state_hash = "ab"
    pool = build(first, second)
    wait_until(lambda: said(tmp_path).count("ready") == 2)
    trainer.publish()
    first.version = 1
    assert pool.audit(1) == {first.url[7:]: "ab"}
    (dead,) = told(tmp_path, "dead")
    assert dead["reason"] == f"{second.url} is at version 0, not 1"
    waits = told(tmp_path, "waits")[-1]
    assert waits["waits_for"] == f"{second.url} to get from version 0 to 1"
    second.version = 1
    wait_until(lambda: said(tmp_path).count("ready") == 3)
    assert len(pool.audit(1)) == 2


def test_an_audit_of_a_server_whose_ranks_differ_says_so(build, serve, tmp_path):
    server = serve()
    server.ranks = lambda: [{"version": 0, "state_hash": each} for each in ("ab", "cd")]
    pool = build(server)
    assert pool.audit(0) == {server.url[7:]: "ab and cd"}


def test_a_server_that_refuses_to_say_its_version_is_waited_for(build, serve, tmp_path):
    first, second = serve(), serve()
    first.serve = lambda path, body, headers: (400, {"error": "which model?"})
    pool = build(first, second)
    wait_until(lambda: any("answered 400" in e["waits_for"] for e in told(tmp_path, "waits")))
    pool.submit("0", units(1), 0)
    assert len(pool.collect("0")) == 2 and second.asked


def test_a_server_that_no_unit_may_be_given_says_what_it_waits_for(
    build,
    serve,
    trainer,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(pool_place, "LAG_S", 0.2)
    server = serve()
    pool = build(server)
    wait_until(lambda: "ready" in said(tmp_path))
    trainer.publish()
    time.sleep(0.5)
    assert told(tmp_path, "waits") == []  # nobody asks for anything
    pool.submit("0", units(1), 1)
    wait_until(lambda: told(tmp_path, "waits"))
    (seen,) = places_seen(read_events(tmp_path))
    waits_for = f"waits for {server.url} to get from version 0 to 1"
    assert (seen.state, seen.note) == ("running", waits_for)
    server.version = 1
    assert len(pool.collect("0")) == 2 and len(told(tmp_path, "waits")) == 1
    (seen,) = places_seen(read_events(tmp_path))
    assert (seen.state, seen.version, seen.note) == ("running", 1, "")


def test_what_a_server_is_wished_for_in_vain_ends_no_run(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ENGINE_TOKEN", "word")
    server = serve()
    pools = (PoolConfig(name="far", urls=(server.url,)), PoolConfig(name="spare", engines=0))
    rollout, recovery = RolloutConfig(pools=pools), RecoveryConfig(pause_s=0.1)
    pool = RolloutPool(str(tmp_path), rollout, recovery, MODEL)
    pool.open()
    try:
        wait_until(lambda: "ready" in said(tmp_path))
        wished = {"far": Wish(engines=0, urls=(server.url,))}
        write_wishes(tmp_path, wished | {"spare": Wish(engines=0, urls=("http://gpu8:8000",))})
        wait_until(lambda: events(tmp_path, "lifecycle"))
        (lost,), (news,) = told(tmp_path, "lost"), events(tmp_path, "lifecycle")
        assert lost["engine"] == "gpu8:8000" and "expected https" in lost["reason"]
        assert news["why"] == f"a place was given up: {lost['reason']}"
        pool.submit("0", units(1), 0)
        assert len(pool.collect("0")) == 2
    finally:
        pool._queue.fail("the test is over")


def test_what_a_server_of_the_recipe_cannot_be_ends_the_run(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_ENGINE_TOKEN", "word")
    pools = (PoolConfig(name="far", urls=("http://gpu8:8000", "https://gpu9:8000")),)
    pool = RolloutPool(str(tmp_path), RolloutConfig(pools=pools), RecoveryConfig(), MODEL)
    serve()  # the log
    pool.open()
    with pytest.raises(RuntimeError, match="could not be built: .*expected https"):
        pool.watch()


def test_a_server_that_answers_nonsense_is_lost_alone(build, serve, tmp_path, monkeypatch):
    """An error that nobody thought of, of one that runs."""
    first, second = serve(), serve()
    pool = build(first, second)
    wait_until(lambda: said(tmp_path).count("ready") == 2)
    sound = ServerEngine.look

    def look(engine, head):
        if engine.name in first.url:
            raise KeyError("results")
        sound(engine, head)

    monkeypatch.setattr(ServerEngine, "look", look)
    wait_until(lambda: told(tmp_path, "lost"))
    pool.submit("0", units(1), 0)
    assert len(pool.collect("0")) == 2 and len(second.asked) == 2
    assert told(tmp_path, "dead")[0]["reason"] == "KeyError: 'results'"


def test_an_unfit_engine_is_renewed_after_a_pause(serve, trainer, tmp_path):
    server = serve()
    rollout = RolloutConfig(pools=(PoolConfig(name="far", urls=(server.url,)),), max_behind=1)
    pool = RolloutPool(str(tmp_path), rollout, RecoveryConfig(pause_s=1.0), MODEL)
    pool.open()
    try:
        wait_until(lambda: "ready" in said(tmp_path))
        trainer.publish()
        trainer.publish()
        wait_until(lambda: "reseeded" in said(tmp_path))
        (drained,), (anew,) = told(tmp_path, "drained"), told(tmp_path, "reseeded")
        assert anew["time_s"] - drained["time_s"] >= 1.0
    finally:
        pool._queue.fail("the test is over")


def test_an_audit_of_an_attempt_that_is_over_ends(build, serve, tmp_path):
    pool = build(serve())
    pool.begin_attempt(2)
    with pytest.raises(RuntimeError, match="attempt 1 is over; attempt 2 goes on"):
        pool.audit(0, attempt=1)
