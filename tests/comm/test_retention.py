import random
import threading

import pytest
from gossamer.comm import retention
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import GoneError, LogError, WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import read_state
from gossamer.comm.retention import Swept, gc
from gossamer.comm.subscriber import Subscriber
from toy_weights import CONFIG, SMALL, moved, new_writer, rows_of, same_bits, toy_state, zeros


def write(folder, versions):
    """Anchors at 0, 4, 8, ..."""
    log, writer = new_writer(folder)
    states = [toy_state(shapes=SMALL)]
    for step in range(versions):
        writer.publish(rows_of(states[-1]), step)
        states.append(moved(states[-1], 0.3, step))
    return log, states[:-1]


@pytest.fixture
def clock(monkeypatch):
    """What gc takes for the time, in seconds."""
    now = [1e9]
    monkeypatch.setattr(retention.time, "time", lambda: now[0])
    return now


def named_parts(log):
    refs = (m for v in log.versions() for m in (log.manifest(v).delta, log.manifest(v).anchor))
    return {ref.name for each in refs for ref in each}


@pytest.mark.parametrize(
    ("keep_versions", "keep_anchors", "floor"),
    [
        (1, 1, 8),
        (2, 1, 8),
        (3, 1, 8),
        (4, 1, 4),
        (1, 2, 4),
        (6, 1, 4),
        (7, 1, 4),
        (8, 1, 0),
        (1, 3, 0),
    ],
)
def test_what_is_kept_is_whole(tmp_path, keep_versions, keep_anchors, floor):
    log, states = write(tmp_path, 11)
    swept = gc(log, keep_versions, keep_anchors, grace_s=0)
    assert swept == Swept(floor, floor, floor + len(range(4, floor, 4)), 0)
    fresh = WeightLog.open(tmp_path)
    assert (fresh.head(), fresh.versions()) == (10, list(range(floor, 11)))
    assert set(fresh.store.list("parts/")) == named_parts(fresh)
    for version in range(floor, 11):
        assert same_bits(read_state(fresh, version), states[version])
    for version in range(floor):
        with pytest.raises(LogError, match=f"has no version {version}"):
            read_state(fresh, version)
    (tmp_path / "HEAD").unlink()
    live = LiveWeights(zeros(SMALL))
    assert Subscriber(WeightLog.open(tmp_path), live).catch_up() == 10
    assert same_bits(live.tensors, states[10])
    assert gc(log, keep_versions, keep_anchors, grace_s=0) == Swept(floor, 0, 0, 0)


def test_parts_outlive_their_manifest_by_the_grace(tmp_path, clock):
    log, states = write(tmp_path, 6)
    assert gc(log, 1, grace_s=60) == Swept(4, 4, 0, 4)
    # planned before: its log knows the old manifests
    slow = Subscriber(log, LiveWeights(zeros(SMALL)))
    for version in range(4):
        slow.commit(slow.fetch_and_stage(version))
    clock[0] += 59
    assert gc(log, 1, grace_s=60) == Swept(4, 0, 0, 4)
    clock[0] += 1
    assert gc(log, 1, grace_s=60) == Swept(4, 0, 4, 0)
    assert set(log.store.list("parts/")) == named_parts(WeightLog.open(tmp_path))


def test_a_pass_over_a_newer_floor_does_not_shorten_the_grace(tmp_path, clock):
    log, writer = new_writer(tmp_path)
    state = toy_state(shapes=SMALL)
    for step in range(9):
        writer.publish(rows_of(state), step)
        if step in (4, 8):
            gc(log, 1, grace_s=60)
            clock[0] += 40
    assert gc(log, 1, grace_s=60) == Swept(8, 0, 4, 5)
    clock[0] += 20
    assert gc(log, 1, grace_s=60) == Swept(8, 0, 5, 0)


def test_parts_of_attempts_that_were_never_committed_go(tmp_path):
    log, writer = new_writer(tmp_path)
    state = toy_state(shapes=SMALL)
    writer.publish(rows_of(state), 0)
    for name in ("00000001-e0001-p0.delta", "00000001-e0002-p1.anchor", "00000002-e0002-p0.anchor"):
        log.store.put(f"parts/{name}", b"left behind")
    assert gc(log, 1, grace_s=0).parts == 0  # an open attempt: nobody can tell yet
    heir = Publisher(log, writer_epoch=3, config=CONFIG)
    heir.publish(rows_of(state), 0)
    assert gc(log, 5, grace_s=0).parts == 2
    heir.publish(rows_of(state), 1)
    assert gc(log, 5, grace_s=0).parts == 1
    assert set(log.store.list("parts/")) == named_parts(log)


def test_a_pass_that_is_killed_anywhere_is_finished_by_the_next(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed_at(count, store, name):
        calls = iter(range(count))
        method = getattr(store, name)

        def call(*arguments, **options):
            if next(calls, None) is None:
                raise Killed
            return method(*arguments, **options)

        monkeypatch.setattr(store, name, call)

    for count in range(12):
        log, states = write(tmp_path / str(count), 7)
        killed_at(count, log.store, "delete")
        try:
            gc(log, 1, grace_s=0)
        except Killed:
            pass
        fresh = WeightLog.open(tmp_path / str(count))
        assert fresh.versions()[-1] == fresh.head() == 6
        for version in (4, 5, 6):
            assert same_bits(read_state(fresh, version), states[version])
        gc(fresh, 1, grace_s=0)
        assert fresh.versions() == [4, 5, 6]
        assert set(fresh.store.list("parts/")) == named_parts(fresh)


def test_a_reader_whose_files_vanish_goes_on_from_the_newest_anchor(tmp_path):
    log, states = write(tmp_path, 10)
    live = LiveWeights(zeros(SMALL))
    lagging = Subscriber(log, live)
    for version in range(2):
        lagging.commit(lagging.fetch_and_stage(version))
    lagging.next_version()  # it has read every manifest up to the head
    gc(WeightLog.open(tmp_path), 1, grace_s=0)
    with pytest.raises(GoneError, match=r"parts/00000002-e0001-p0\.delta is missing"):
        lagging.fetch_and_stage(2)
    assert same_bits(live.tensors, states[1])
    assert lagging.next_version() == 8
    assert lagging.catch_up() == 9
    assert same_bits(live.tensors, states[9])


@pytest.mark.parametrize("seed", range(8))
def test_readers_beside_a_collector_are_never_wrong(tmp_path, seed):
    dice = random.Random(seed)
    log, writer = new_writer(tmp_path)
    states = [toy_state(seed, SMALL)]
    writer.publish(rows_of(states[0]), 0)
    ended, faults, seen = threading.Event(), [], []

    def guarded(work):
        def run():
            own = WeightLog.open(tmp_path)
            try:
                work(own, random.Random(dice.random()))
            except BaseException as error:
                faults.append(error)

        return threading.Thread(target=run)

    def read(own, own_dice):
        live = LiveWeights(zeros(SMALL))
        subscriber = Subscriber(own, live)
        while not (ended.is_set() and live.version == own.head()):
            for _ in range(own_dice.randrange(1, 4)):
                version = subscriber.next_version()
                if version is None:
                    break
                ended.wait(own_dice.random() * 0.01)
                try:
                    subscriber.commit(subscriber.fetch_and_stage(version))
                except GoneError:
                    seen.append(version)
                assert live.version is None or same_bits(live.tensors, states[live.version])
            if own_dice.random() < 0.1:
                live = LiveWeights(zeros(SMALL))
                subscriber = Subscriber(own, live)

    def collect(own, own_dice):
        while not ended.is_set():
            gc(own, own_dice.randrange(1, 4), grace_s=0)

    threads = [guarded(work) for work in (read, read, collect)]
    for thread in threads:
        thread.start()
    try:
        for step in range(1, 24):
            states.append(moved(states[-1], 0.3, step))
            writer.publish(rows_of(states[-1]), step)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert faults == []


@pytest.mark.parametrize("text", ['{"floors": [[99, 0.0], [7, 0.0]]}', '{"floors": 3}', "[", "{}"])
def test_a_note_that_cannot_be_right_deletes_nothing(tmp_path, text):
    log, states = write(tmp_path, 7)
    (tmp_path / "gc.json").write_text(text)
    assert gc(log, 1, grace_s=60) == Swept(4, 4, 0, 4)
    assert same_bits(read_state(WeightLog.open(tmp_path)), states[6])


def test_an_empty_log_and_a_wrong_wish(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    assert gc(log, 1) is None
    for wish in [(0, 1, 0), (1, 0, 0), (1, 1, -1)]:
        with pytest.raises(ValueError, match="keep_versions and keep_anchors must be at least 1"):
            gc(log, *wish)
