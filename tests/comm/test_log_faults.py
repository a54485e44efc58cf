"""What a broken or hostile store can do to a chain of versions, and that nobody falls for it."""

import json
import re
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import LogError, StaleWriterError, WeightLog
from gossamer.comm.manifest import PartRef, manifest_name, pack_manifest
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import StateReader, read_head, read_state
from gossamer.comm.subscriber import AuditError, Subscriber
from gossamer.comm.verify import verify
from gossamer.comm.wire import frame_digest, pack_frame, unpack_frame
from toy_weights import CONFIG, SHAPES, moved, new_writer, rows_of, same_bits, toy_state, zeros


@pytest.fixture
def written(tmp_path):
    """Seven versions, anchors at 0 and 4; every part of the log in one folder."""
    log, writer = new_writer(tmp_path / "log")
    states = [toy_state()]
    for step in range(7):
        writer.publish(rows_of(states[-1]), step)
        states.append(moved(states[-1], 0.05, step))
    return log, states


def at(log, version):
    """A follower at `version`, with a log that has read nothing yet but what it needed."""
    live = LiveWeights(zeros())
    subscriber = Subscriber(WeightLog.open(log.store.root), live)
    for each in range(version + 1):
        subscriber.commit(subscriber.fetch_and_stage(each))
    return live, subscriber


def forge(log, version, **fields):
    """Another manifest for `version`, as whoever holds the bucket could write it."""
    manifest = replace(log.manifest(version), **fields)
    (log.store.root / manifest_name(version)).write_bytes(pack_manifest(manifest))


def refuses(log, version, error, message):
    """A follower at `version` is stopped, and stays what it is."""
    live, subscriber = at(log, version)
    before = {name: values.clone() for name, values in live.tensors.items()}
    with pytest.raises(error, match=message):
        subscriber.commit(subscriber.fetch_and_stage(version + 1))
    assert live.version == version and same_bits(live.tensors, before)


def faults(log):
    return verify(WeightLog.open(log.store.root)).faults


def test_a_sound_log_has_no_faults(written):
    log, _ = written
    seen = []
    verdict = verify(log, replay=True, on_progress=lambda done, total: seen.append((done, total)))
    manifests = map(log.manifest, range(7))
    nbytes = sum(ref.nbytes for each in manifests for ref in each.delta + each.anchor)
    assert (verdict.versions, verdict.folds, verdict.nbytes, verdict.faults) == (7, 0, nbytes, [])
    assert seen == [(done, 14) for done in range(1, 15)]


def test_a_version_that_is_skipped(written):
    log, states = written
    live, subscriber = at(log, 0)
    with pytest.raises(ApplyError, match="version 2 goes on version 1 and holds no anchor, but v"):
        subscriber.fetch_and_stage(2)
    with pytest.raises(ApplyError, match="delta of version 2 goes on version 1 with state hash"):
        live.stage(log.manifest(2), [log.read_part(log.manifest(2).delta[0])])
    assert live.version == 0 and same_bits(live.tensors, states[0])
    (log.store.root / manifest_name(2)).unlink()
    reader = WeightLog.open(log.store.root)
    assert reader.head() == 6 and reader.next_version(0) == 4  # over the gap by the anchor
    assert "not all versions from 0 to 6 are there" in faults(log)


def test_versions_that_are_reordered(written):
    log, _ = written
    two, three = (log.store.root / manifest_name(v) for v in (2, 3))
    text = two.read_bytes()
    two.write_bytes(three.read_bytes())
    three.write_bytes(text)
    refuses(log, 1, LogError, r"manifest-00000002.json is of run \w+, version 3; expected")
    forge(log, 2, delta=log.manifest(3).delta)
    refuses(log, 1, ApplyError, r"expected \('delta', '\w+', 2, 1,")


def test_parts_that_are_reordered(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    epoch, state = log.claim_epoch(), toy_state()
    others = threading.Thread(
        target=lambda: Publisher(log, 1, 2, epoch, CONFIG).publish(rows_of(state, 1, 2), 0)
    )
    others.start()
    Publisher(log, 0, 2, epoch, CONFIG).publish(rows_of(state, 0, 2), 0)
    others.join()
    assert faults(log) == []
    forge(log, 0, anchor=log.manifest(0).anchor[::-1])
    assert "p1.anchor is (kind, version, step, part, num_parts)" in faults(log)[0]
    forge(log, 0, anchor=log.manifest(0).anchor[:1])
    with pytest.raises(ApplyError, match="does not hold every live tensor once"):
        at(log, 0)
    forge(log, 0, anchor=log.manifest(0).anchor * 2)
    with pytest.raises(ApplyError, match="does not hold every live tensor once"):
        at(log, 0)


def test_a_version_that_is_replayed(written):
    log, states = written
    live, subscriber = at(log, 3)
    for version in (3, 4, 4, 4):  # again and again: nothing happens
        subscriber.commit(subscriber.fetch_and_stage(version))
    assert live.version == 4 and same_bits(live.tensors, states[4])
    parts = [log.store.root / log.manifest(v).delta[0].name for v in (2, 3)]
    saved = parts[1].read_bytes()
    shutil.copy(parts[0], parts[1])
    refuses(log, 2, LogError, r"parts/00000003-e0001-p0\.delta has \d+ bytes and digest")
    parts[1].write_bytes(saved)
    forge(log, 3, delta=log.manifest(2).delta)
    refuses(log, 2, ApplyError, "expected")
    # the whole of version 2 once more, renumbered as version 3
    frame = replace(unpack_frame(parts[0].read_bytes()), version=3)
    data = pack_frame(frame)
    parts[1].write_bytes(data)
    ref = PartRef(log.manifest(3).delta[0].name, len(data), frame_digest(data))
    fields = {"delta": [ref], "state_hash": log.manifest(2).state_hash}
    forge(log, 3, **fields, base_version=1, base_state_hash=log.manifest(1).state_hash)
    refuses(log, 2, ApplyError, "version 3 goes on version 1")


def test_a_wrong_base(written):
    log, states = written
    live, subscriber = at(log, 2)
    live.tensors["model.embed_tokens.weight"].view(torch.int16)[:] ^= 1  # behind everyone's back
    with pytest.raises(ApplyError, match="that are not those of version 2: model.embed_tokens"):
        subscriber.catch_up()
    other, writer = new_writer(log.store.root.parent / "other")
    for step in range(4):
        writer.publish(rows_of(states[2]), step)
    with pytest.raises(ApplyError, match="the live weights are of run"):
        Subscriber(other, live).catch_up()
    forge(log, 3, base_state_hash="0123456789abcdef")
    refuses(log, 2, ApplyError, "base hash|state hash 0123456789abcdef")


def test_a_chain_is_as_strong_as_its_links(written):
    log, _ = written
    for fields, message in [
        ({"parent_hash": "0" * 64}, "version 5 names .* as its parent; expected"),
        ({"parent_version": 3}, "version 5 names .* as its parent; expected"),
        ({"base_state_hash": "0" * 16}, "the delta of version 5 does not go on its parent"),
        ({"state_hash": "0" * 16}, "version 5 add up to state hash .*; its manifest says 0000"),
        ({"step": 9}, r"p0.delta is \(kind, version, step"),
        ({"delta": [], "anchor": log.manifest(4).anchor}, r"p0.anchor is \(kind, version, step"),
    ]:
        forge(log, 5, **fields)
        assert any(re.search(message, fault) for fault in faults(log)), fields
    forge(log, 5, created_s=0.0)  # nothing but the date: its child still notices
    assert faults(log) and faults(log)[0].startswith("version 6 names (5,")
    forge(log, 5)
    assert faults(log) == []
    part = log.store.root / log.manifest(5).delta[0].name
    part.unlink()
    assert "parts/00000005-e0001-p0.delta is missing" in faults(log)[0]


def test_a_head_is_read_without_its_payload(written):
    log, _ = written
    asked = []
    ref = log.manifest(4).anchor[0]
    whole, get = unpack_frame(log.read_part(ref)), log.store.get

    def counted(name, start=0, stop=None):
        data = get(name, start, stop)
        asked.append(len(data))
        return data

    log.store.get = counted
    head = read_head(log, ref)
    assert [run.name for run in head.runs] == [run.name for run in whole.runs]
    assert replace(head, runs=[]) == replace(whole, runs=[])
    part = log.store.root / ref.name
    part.write_bytes(b"GSMR" + bytes(200))
    with pytest.raises(LogError, match=r"p0\.anchor is not a sound frame"):
        read_head(log, ref)


def test_a_state_that_does_not_hash_to_its_manifest_is_not_read(written):
    log, states = written
    forge(log, 3, state_hash="0" * 16)
    with pytest.raises(LogError, match="version 3 hashes to .*; its manifest says 0{16}"):
        read_state(WeightLog.open(log.store.root), 3)
    assert same_bits(dict(StateReader(log, 2)), states[2])


def test_a_second_writer_is_refused_and_a_takeover_ends_the_first(written):
    log, states = written
    second = WeightLog.open(log.store.root)
    with pytest.raises(StaleWriterError, match=r"has a writer, epoch 1; .*\(takeover=True\)"):
        Publisher(second, config=CONFIG)
    assert log.current_epoch() == 1
    heir = Publisher(second, config=CONFIG, takeover=True)
    assert log.current_epoch() == 2
    heir.publish(rows_of(states[3]), 3, rewind_to_step=3)
    assert same_bits(read_state(second), states[3])
    with pytest.raises(ValueError, match="writer_epoch must be given, the same to all 2 parts"):
        Publisher(second, 0, 2)


def test_audits_come_when_they_are_due_and_name_what_drifted(written):
    log, _ = written
    live = LiveWeights(zeros())
    with pytest.raises(AuditError, match="no version is live"):
        Subscriber(log, live).audit()
    subscriber = Subscriber(log, live, audit_every_versions=3)
    for version in range(3):
        subscriber.commit(subscriber.fetch_and_stage(version))
    assert subscriber.audit() == log.manifest(2).state_hash
    names = sorted(SHAPES)[:2]
    staged = [None, None, None]
    for number in range(3):
        staged[number] = subscriber.fetch_and_stage(3 + number)
        if number == 2:
            break
        subscriber.commit(staged[number])
    for name in names:
        live.tensors[name].view(torch.int16)[-1] ^= 4
    with pytest.raises(AuditError, match=f"other than committed: {names[0]}, {names[1]}$"):
        subscriber.commit(staged[2])
    assert live.version == 5


def test_a_log_with_a_malformed_claim_is_named(tmp_path):
    WeightLog.open(tmp_path, create=True)
    entry = json.loads((tmp_path / "log.json").read_text())
    (tmp_path / "log.json").write_text(json.dumps(entry | {"wire_version": 1}))
    with pytest.raises(LogError, match="has wire version 1, not 2"):
        WeightLog.open(tmp_path)
