import shutil
import threading

import pytest
from gossamer.comm.codec.part import Rows
from gossamer.comm.config import LogConfig
from gossamer.comm.engines.follow import EngineError, Server, follow
from gossamer.comm.fold import fold
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from served_engine import ServedEngine
from served_model import checkpoint

UPDATE = ["start_weight_update", "update_weights", "finish_weight_update", "resume"]


class Trainer:
    """Publishes checkpoint(n) as version n."""

    def __init__(self, folder):
        self.log = WeightLog.open(folder, create=True)
        self.publisher = Publisher(self.log, config=LogConfig(anchor_every_versions=100))
        self.version = -1

    def publish(self):
        self.version += 1
        state = checkpoint(self.version)
        rows = [Rows(name, tuple(each.shape), 0, each) for name, each in state.items()]
        self.publisher.publish(rows, step=self.version)


@pytest.fixture
def trainer(tmp_path):
    trainer = Trainer(tmp_path / "log")
    trainer.publish()
    return trainer


@pytest.fixture
def engine():
    engine = ServedEngine()
    yield engine
    engine.close()


def run(trainer, engine, until=None, **options):
    """Follows until the newest version is live; what was told on the way."""
    told = []
    until = until or (lambda live: live == trainer.version)
    follow(
        trainer.log.url, engine.url, poll_s=0.01, on_progress=told.append, until=until, **options
    )
    return told


def test_versions_are_staged_before_the_pause_and_committed_in_it(trainer, engine):
    told = run(trainer, engine)
    assert [each.event for each in told] == ["started", "committed"]
    assert engine.calls == [
        "init_weight_transfer_engine", "gossamer_stage", "pause?mode=keep&clear_cache=true", *UPDATE
    ]  # fmt: skip
    for mode in ("wait", "abort"):
        trainer.publish()
        engine.calls.clear()
        (done,) = run(trainer, engine, mode=mode)
        pause = f"pause?mode={mode}&clear_cache=true"
        assert engine.calls == ["resume", "gossamer_stage", pause, *UPDATE]
        assert (done.event, done.version) == ("committed", trainer.version)
        manifest = trainer.log.manifest(trainer.version)
        assert done.fetched_bytes == 2 * sum(ref.nbytes for ref in manifest.delta)
        assert done.num_changed >= manifest.num_changed > 0
        assert 0 < done.commit_s < done.pause_s and done.stage_s > 0
        assert engine.is_at(checkpoint(trainer.version)) and not engine.paused
        assert engine.weight_version == f"{trainer.version}@{trainer.log.run_id}"
    with pytest.raises(ValueError, match="mode must be one of keep, wait, abort"):
        follow(trainer.log.url, engine.url, mode="kill")


def test_a_rank_that_fails_takes_all_back_and_is_tried_again(trainer, engine):
    run(trainer, engine)
    trainer.publish()
    rank, norm = engine.followers[1], engine.models[1].norm
    whole, norm.data = norm.data, norm.data[:5].clone()
    seen = []

    def mend():
        seen.append((engine.followers[0].version, rank.version))
        norm.data = whole

    engine.faults["gossamer_roll_back"] = mend
    told = run(trainer, engine)
    assert [each.event for each in told] == ["failed", "committed"]
    assert "norm is not where it was" in told[0].detail and seen == [(1, 0)]
    rolled = engine.calls.index("gossamer_roll_back")
    assert engine.calls[rolled + 1] == "resume"
    assert engine.is_at(checkpoint(1))


def test_between_failure_and_retry_the_old_version_is_served(trainer, engine):
    run(trainer, engine)
    trainer.publish()
    engine.faults["finish_weight_update"] = lambda: 1 / 0
    told = run(trainer, engine, until=lambda live: "gossamer_roll_back" in engine.calls)
    assert told[0].event == "failed" and "division by zero" in told[0].detail
    assert engine.is_at(checkpoint(0)) and not engine.paused and not any(engine.updating)
    assert [follower.version for follower in engine.followers] == [0, 0]


def test_a_first_load_that_fails_stays_paused(trainer, engine):
    engine.faults["finish_weight_update"] = lambda: 1 / 0
    run(trainer, engine, until=lambda live: "gossamer_roll_back" in engine.calls)
    assert engine.paused
    engine.faults.clear()
    run(trainer, engine)
    assert engine.is_at(checkpoint(0)) and not engine.paused


def test_an_engine_that_comes_back_empty_catches_up(trainer, engine):
    run(trainer, engine)
    for _ in range(3):
        trainer.publish()
    engine.faults["gossamer_stage"] = lambda: (engine.faults.clear(), engine.begin())
    told = run(trainer, engine)
    assert [each.event for each in told] == ["failed", "started"] + ["committed"] * 4
    assert engine.is_at(checkpoint(3))


def test_an_engine_that_is_away_is_waited_for(trainer, engine):
    engine.faults["gossamer_status"] = lambda: 1 / 0
    told = []
    thread = threading.Thread(target=lambda: told.extend(run(trainer, engine)))
    thread.start()
    engine.wait_until(lambda: thread.is_alive())
    engine.faults.clear()
    thread.join(timeout=120)
    assert engine.is_at(checkpoint(0)) and told[-1].event == "committed"
    assert sum(each.event == "failed" for each in told) <= 1  # the same failure is told once


def test_a_store_that_is_away_is_waited_for(trainer, engine, tmp_path):
    run(trainer, engine)
    trainer.publish()
    parts = tmp_path / "log" / "parts"
    parts.rename(tmp_path / "away")

    told = []

    def until(live):
        if len(told) == 3 and not parts.exists():
            (tmp_path / "away").rename(parts)
        return live == trainer.version

    follow(trainer.log.url, engine.url, poll_s=0.01, on_progress=told.append, until=until)
    assert [each.event for each in told[-2:]] == ["failed", "committed"]
    assert "part of a committed version" in told[0].detail
    assert engine.is_at(checkpoint(1))
    assert engine.calls.count("update_weights") == 2  # nothing was paused before it was there


def test_a_fold_that_is_gone_is_gone_round(trainer, engine):
    run(trainer, engine)
    for _ in range(3):
        trainer.publish()
    fold(trainer.log, 0, 3)
    for ref in trainer.log.fold(0, 3).delta:
        trainer.log.store.delete(ref.name)
    told = run(trainer, engine)
    assert [each.version for each in told if each.event == "committed"] == [1, 2, 3]
    assert engine.is_at(checkpoint(3))


def test_what_a_dead_driver_left_is_ended(trainer, engine):
    run(trainer, engine)
    trainer.publish()
    engine.gossamer_stage(1)
    engine.pause()
    engine.start_weight_update()
    engine.update_weights({"version": 1})
    assert engine.is_at(checkpoint(1))
    run(trainer, engine)
    assert "gossamer_roll_back" in engine.calls
    assert engine.is_at(checkpoint(1)) and not engine.paused
    assert engine.weight_version == f"1@{trainer.log.run_id}"


def test_an_audit_that_fails_brings_an_anchor(trainer, engine):
    run(trainer, engine, audit_every_versions=1)
    engine.followers[0].audit()  # which waits for the one that the commit asked for
    engine.models[0].norm.data[3] += 1
    engine.followers[0].stage(0)
    engine.followers[0].commit(0)
    engine.followers[0].finish()
    engine.wait_until(lambda: engine.followers[0].status()["audit_failure"])
    trainer.publish()
    told = run(trainer, engine)
    assert "AuditError" in told[0].detail and "model.norm.weight" in told[0].detail
    assert engine.is_at(checkpoint(1))
    assert engine.followers[0].status()["audit_failure"] is None
    assert {follower.audit() for follower in engine.followers} == {
        trainer.log.manifest(1).state_hash
    }


def test_another_log_at_the_same_place_is_noticed(trainer, engine, tmp_path):
    run(trainer, engine)
    other = Trainer(tmp_path / "other")
    other.publish()
    assert [each.event for each in run(other, engine)] == ["started", "committed"]


def test_a_run_that_is_begun_anew_under_the_follower_is_loaded(trainer, engine, monkeypatch):
    monkeypatch.setattr("gossamer.comm.engines.follow.SAME_LOG_S", 0.1)
    for _ in range(2):
        trainer.publish()
    again = []

    def until(live):
        if live == 2 and not again:  # as `gossamer rl RECIPE --overwrite` does
            shutil.rmtree(trainer.log.url)
            again.append(Trainer(trainer.log.url))
            again[0].publish()
        return bool(again) and live == 0

    told = []
    follow(trainer.log.url, engine.url, poll_s=0.01, on_progress=told.append, until=until)
    assert [each.event for each in told[-2:]] == ["started", "committed"]
    assert again[0].log.run_id != trainer.log.run_id
    assert engine.weight_version == f"0@{again[0].log.run_id}"


def test_servers_that_were_started_otherwise_are_told_how(engine):
    server = Server(engine.url, 5)
    with pytest.raises(EngineError, match="start vLLM with --weight-transfer-config"):
        server.rpc("gossamer_fly")
    engine.close()
    with pytest.raises(EngineError, match=f"no answer from {engine.url}/resume"):
        server.post("/resume")
