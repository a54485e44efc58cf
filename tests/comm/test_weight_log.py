import json
import re
import threading
from dataclasses import replace

import pytest
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import LogError, WeightLog
from gossamer.comm.reader import read_state
from gossamer.comm.subscriber import Subscriber
from toy_weights import moved, new_writer, rows_of, same_bits, toy_state, zeros


@pytest.fixture
def written(tmp_path):
    """A log of seven versions, anchors at 0 and 4, and the states they hold."""
    log, writer = new_writer(tmp_path)
    states = [toy_state()]
    for turn in range(1, 7):
        states.append(moved(states[-1], 0.05, turn))
    for step, state in enumerate(states):
        writer.publish(rows_of(state), step)
    return log, states


def test_a_log_is_opened_where_one_is(tmp_path):
    with pytest.raises(LogError, match="no weight log at .*nowhere"):
        WeightLog.open(tmp_path / "nowhere")
    with pytest.raises(LogError, match="log.json is missing"):
        WeightLog.open(tmp_path)
    made = WeightLog.open(tmp_path, run_id="mine", create=True)
    assert WeightLog.open(f"file://{tmp_path}").run_id == made.run_id == "mine"
    assert WeightLog.open(tmp_path, create=True, name="yours").run_id == "mine"
    two = [WeightLog.open(tmp_path / each, create=True, name="demo").run_id for each in "ab"]
    assert two[0] != two[1] and all(re.fullmatch("demo-[0-9a-f]{16}", each) for each in two)
    with pytest.raises(LogError, match="is of run mine, not yours"):
        WeightLog.open(tmp_path, run_id="yours")
    (tmp_path / "log.json").write_text("[1")
    with pytest.raises(LogError, match="log.json must hold run_id"):
        WeightLog.open(tmp_path)


def test_an_empty_log_has_no_head(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    assert log.head() is None
    assert Subscriber(log, LiveWeights(zeros())).next_version() is None
    with pytest.raises(LogError, match="holds no anchor"):
        log.newest_anchor()
    with pytest.raises(LogError, match="has no version None"):
        read_state(log)


def test_every_version_reads_back_bit_for_bit(written):
    log, states = written
    assert log.head() == 6
    for version, state in enumerate(states):
        assert same_bits(read_state(log, version), state)
    assert same_bits(read_state(log), states[-1])
    with pytest.raises(LogError, match="has no version 7"):
        read_state(log, 7)


def test_anchors_lie_where_the_config_says(written):
    log, _ = written
    kinds = [(bool(m.delta), bool(m.anchor)) for m in map(log.manifest, range(7))]
    assert kinds == [(False, True)] + [(True, False)] * 3 + [(True, True)] + [(True, False)] * 2
    assert [log.newest_anchor(version) for version in range(7)] == [0, 0, 0, 0, 4, 4, 4]
    assert log.newest_anchor() == 4


def test_a_late_joiner_equals_the_follower(written):
    log, states = written
    follower, late = LiveWeights(zeros()), LiveWeights(zeros())
    following = Subscriber(log, follower)
    for version in range(7):  # through every delta, also past the anchor at 4
        following.commit(following.fetch_and_stage(version))
    joining = Subscriber(log, late)
    assert joining.next_version() == 4
    assert joining.catch_up() == 6
    assert same_bits(late.tensors, follower.tensors)
    assert late.audit() == follower.audit() == log.manifest(6).state_hash
    read = [*log.manifest(4).anchor, *log.manifest(5).delta, *log.manifest(6).delta]
    assert joining.fetched_bytes == sum(ref.nbytes for ref in read)
    assert joining.next_version() is None and joining.catch_up() == 6


def test_a_missing_part_is_named(written, tmp_path):
    log, _ = written
    (tmp_path / "parts/00000005-e0001-p0.delta").unlink()
    subscriber = Subscriber(log, LiveWeights(zeros()))
    with pytest.raises(LogError, match=r"missing or unsound: parts/00000005-e0001-p0\.delta$"):
        subscriber.catch_up()


def test_a_damaged_part_is_named(written, tmp_path):
    log, _ = written
    part = tmp_path / "parts/00000004-e0001-p0.anchor"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    sentence = r"parts/00000004-e0001-p0\.anchor is not a sound frame: its bytes do not match"
    with pytest.raises(LogError, match=sentence):
        read_state(log, 4)
    with pytest.raises(ApplyError, match=sentence):
        Subscriber(log, LiveWeights(zeros())).catch_up()
    part.write_bytes(data[:-1])
    with pytest.raises(LogError, match=r"parts/00000004-e0001-p0\.anchor has \d+ bytes"):
        read_state(log, 4)


def test_a_bad_manifest_is_named(written, tmp_path):
    _, _ = written
    path = tmp_path / "manifest-00000006.json"
    entry = json.loads(path.read_text())
    for text, message in [
        ("{", "manifest-00000006.json is not a manifest"),
        (json.dumps(entry | {"delta": [{"name": 1}]}), "is not a manifest"),
        (json.dumps({key: entry[key] for key in entry if key != "step"}), "lacks field 'step'"),
        (json.dumps(entry | {"run_id": "other"}), "is of run other"),
        (json.dumps(entry | {"version": 5}), "version 5; expected"),
        (json.dumps(entry | {"state_hash": 5}), "field state_hash"),
        (json.dumps(entry | {"base_version": "5"}), "field base_version"),
    ]:
        path.write_text(text)
        with pytest.raises(LogError, match=message):
            WeightLog.open(tmp_path).manifest(6)
    path.unlink()
    with pytest.raises(LogError, match="manifest-00000006.json is missing"):
        WeightLog.open(tmp_path).manifest(6)


def test_the_head_needs_no_hint(written, tmp_path):
    hint = tmp_path / "HEAD"
    assert hint.read_text() == "6"
    for text in ("2", "99", "", "no number"):
        hint.write_text(text)
        assert WeightLog.open(tmp_path).head() == 6
    hint.unlink()
    assert WeightLog.open(tmp_path).head() == 6


def test_one_of_many_committers_of_a_version_wins(written):
    log, _ = written
    for version in range(7, 12):
        start, won = threading.Barrier(6), []

        def commit(epoch, version=version, start=start, won=won):
            manifest = replace(log.manifest(6), version=version, writer_epoch=epoch)
            start.wait()
            if log.commit(manifest):
                won.append(epoch)

        threads = [threading.Thread(target=commit, args=(epoch,)) for epoch in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [log.manifest(version).writer_epoch]


def test_every_takeover_gets_its_own_epoch(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    assert log.current_epoch() == 0
    claimed = []
    threads = [
        threading.Thread(target=lambda: claimed.append(log.claim_epoch(takeover=True)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(1, 9))
    assert log.current_epoch() == 8
    assert log.is_superseded(7) and not log.is_superseded(8)
