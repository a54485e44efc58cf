"""A mirror is a sound log at every moment, and each frame crosses the link once."""

import os
import random
import signal
import subprocess
import threading
from collections import Counter

import pytest
from gossamer.comm import mirror as mirror_module
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import GoneError, LogError
from gossamer.comm.mirror import mirror
from gossamer.comm.reader import read_state
from gossamer.comm.retention import gc
from gossamer.comm.store import open_store
from gossamer.comm.store.serve import serve
from gossamer.comm.subscriber import Subscriber
from toy_weights import moved, new_writer, rows_of, same_bits, toy_state, zeros


class CountingStore:
    """A store that notes every file that is read, and may fail: `before` is called with each."""

    def __init__(self, store, before=lambda name: None):
        self.read, self.bytes_read = Counter(), 0
        self._store, self._before = store, before

    def get(self, name, start=0, stop=None):
        self._before(name)
        data = self._store.get(name, start, stop)
        self.read[name] += 1
        self.bytes_read += len(data)
        return data

    def put(self, name, data, overwrite=False):
        self._before(name)
        done = self._store.put(name, data, overwrite)
        self._before(name)
        return done

    def list(self, prefix):
        return self._store.list(prefix)

    def size(self, name):
        self._before(name)
        return self._store.size(name)


@pytest.fixture
def written(tmp_path):
    """A log of seven versions, anchors at 0 and 4; its writer, and the states they hold."""
    log, writer = new_writer(tmp_path / "source")
    states = [toy_state()]
    for turn in range(1, 7):
        states.append(moved(states[-1], 0.05, turn))
    for step, state in enumerate(states):
        writer.publish(rows_of(state), step)
    return log, writer, states


def assert_sound(url, states):
    """Every version of the copy is whole and reads back; returns its versions."""
    if open_store(url).size("log.json") is None:
        return []
    log = WeightLog.open(url)
    for version in log.versions():
        manifest = log.manifest(version)
        for ref in (*manifest.delta, *manifest.anchor):
            log.read_part(ref)
        assert same_bits(read_state(log, version), states[version])
    assert log.head() is None or log.head() in log.versions()
    return log.versions()


def test_it_copies_from_the_newest_anchor_on(written, tmp_path):
    log, writer, states = written
    told = []
    done = mirror(log, open_store(tmp_path / "near", create=True), on_progress=told.append)
    assert (done.version, done.head) == (6, 6) and told[-1] == done
    assert assert_sound(tmp_path / "near", states) == [4, 5, 6]
    copy = WeightLog.open(tmp_path / "near")
    assert copy.head() == 6 and copy.run_id == log.run_id
    assert copy.current_epoch() == log.current_epoch() == 1
    for version in (4, 5, 6):
        assert copy.manifest_hash(version) == log.manifest_hash(version)
    named = {r for v in (4, 5, 6) for m in [log.manifest(v)] for r in (*m.delta, *m.anchor)}
    assert done.copied_bytes == sum(ref.nbytes for ref in named)
    assert mirror(log, open_store(tmp_path / "near")).copied_bytes == 0
    states.append(moved(states[-1], 0.05, 7))
    writer.publish(rows_of(states[-1]), 7)
    mirror(log, open_store(tmp_path / "near"))
    assert assert_sound(tmp_path / "near", states) == [4, 5, 6, 7]


def test_it_begins_where_it_is_told(written, tmp_path):
    log, _, states = written
    mirror(log, open_store(tmp_path / "near", create=True), from_version=0)
    assert assert_sound(tmp_path / "near", states) == list(range(7))
    with pytest.raises(LogError, match="from_version 2 holds no anchor to begin with"):
        mirror(log, open_store(tmp_path / "other", create=True), from_version=2)
    with pytest.raises(GoneError, match="manifest-00000009.json"):
        mirror(log, open_store(tmp_path / "other"), from_version=9)


def test_an_empty_log_and_another_log(written, tmp_path):
    log, _, _ = written
    empty = WeightLog.open(tmp_path / "empty", create=True)
    done = mirror(empty, open_store(tmp_path / "near", create=True))
    assert (done.version, done.head, done.copied_bytes) == (None, None, 0)
    with pytest.raises(LogError, match="log.json of the copy is not that of"):
        mirror(log, open_store(tmp_path / "near"))


def test_what_is_damaged_is_not_copied(written, tmp_path):
    log, _, states = written
    part = tmp_path / "source" / log.manifest(5).delta[0].name
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(LogError, match=rf"{part.name} is not a sound frame: its bytes"):
        mirror(log, open_store(tmp_path / "near", create=True))
    assert assert_sound(tmp_path / "near", states) == [4]
    part.unlink()
    with pytest.raises(GoneError, match=rf"{part.name} is missing"):
        mirror(log, open_store(tmp_path / "near"))
    (tmp_path / "near" / log.manifest(6).delta[0].name).write_bytes(b"another")
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(LogError, match=r"has 7 bytes in the copy, not \d+"):
        mirror(log, open_store(tmp_path / "near"))


def test_each_frame_crosses_once_while_three_read(written, tmp_path):
    """Subscribers follow the mirror over HTTP, the mirror follows the source."""
    log, writer, states = written
    far = serve(log.store)
    source = WeightLog.open(far.url)
    source.store = counted = CountingStore(source.store)
    near_store = open_store(tmp_path / "near", create=True)
    stop, last = threading.Event(), 14
    how = {"follow": True, "poll_s": 0.01, "stop": stop}
    copier = threading.Thread(target=mirror, args=(source, near_store), kwargs=how)
    copier.start()
    while near_store.size("HEAD") is None:
        stop.wait(0.01)
    near = serve(near_store)
    lives = [LiveWeights(zeros()) for _ in range(3)]

    def follow(live):
        subscriber = Subscriber(WeightLog.open(near.url), live)
        while live.version != last:
            subscriber.catch_up()

    readers = [threading.Thread(target=follow, args=(live,)) for live in lives]
    for reader in readers:
        reader.start()
    for step in range(7, last + 1):
        states.append(moved(states[-1], 0.05, step))
        writer.publish(rows_of(states[-1]), step)
    for reader in readers:
        reader.join(60)
    stop.set()
    copier.join(10)
    far.close()
    near.close()
    assert all(same_bits(live.tensors, states[-1]) for live in lives)
    manifests = [log.manifest(version) for version in range(4, last + 1)]
    refs = [ref for each in manifests for ref in (*each.delta, *each.anchor)]
    assert {name: times for name, times in counted.read.items() if name.startswith("parts/")} == {
        ref.name: 1 for ref in refs
    }
    frames = sum(ref.nbytes for ref in refs)
    assert counted.bytes_read < frames + 100_000  # manifests, and HEAD while it polls


def test_it_goes_on_after_a_failure_anywhere(written, tmp_path):
    """The copy's store fails before and after every single put and look, in turn."""
    log, _, states = written
    for failing_at in range(200):
        calls = iter(range(1000))

        def fail(name, calls=calls, failing_at=failing_at):
            if next(calls) == failing_at:
                raise OSError(28, "No space left on device", name)

        place = tmp_path / f"near-{failing_at}"
        store = open_store(place, create=True)
        try:
            mirror(log, CountingStore(store, before=fail))
            break
        except OSError:
            assert_sound(place, states)
        mirror(log, store)
        assert assert_sound(place, states) == [4, 5, 6]
    assert 20 < failing_at < 199


def test_it_goes_on_after_sigkill(written, tmp_path):
    """A child is killed before one of its system calls that write, again and again."""
    log, _, states = written
    place, kills = tmp_path / "near", 0
    generator = random.Random(1)
    while True:
        child = os.fork()
        if child == 0:
            _die_within(generator.randrange(1, 12))
            try:
                mirror(log, open_store(place, create=True))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert_sound(place, states)
        if not os.WIFSIGNALED(status):
            break
        kills += 1
    assert assert_sound(place, states) == [4, 5, 6] and kills >= 3


def _die_within(calls):
    left = iter(range(calls))

    def deadly(function):
        def call(*args, **kwargs):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def test_a_source_that_forgets_is_caught_up_with(written, tmp_path):
    """Versions deleted before, and while, they are copied: it goes on at the newest anchor."""
    log, writer, states = written
    near = open_store(tmp_path / "near", create=True)
    mirror(log, near)
    lagging = Subscriber(WeightLog.open(tmp_path / "near"), LiveWeights(zeros()))
    assert lagging.catch_up() == 6
    for step in range(7, 15):
        states.append(moved(states[-1], 0.05, step))
        writer.publish(rows_of(states[-1]), step)
    gc(log, keep_versions=1, grace_s=0)
    gc(log, keep_versions=1, grace_s=0)
    assert log.versions() == [12, 13, 14]
    fresh = WeightLog.open(log.url)
    assert mirror(fresh, near).version == 14
    assert assert_sound(tmp_path / "near", states) == [4, 5, 6, 12, 13, 14]
    live = LiveWeights(zeros())
    reader = Subscriber(WeightLog.open(tmp_path / "near"), live)
    assert reader.catch_up() == lagging.catch_up() == 14 and same_bits(live.tensors, states[-1])

    once = threading.Lock()

    def forget(name):
        if name.startswith("parts/00000012") and once.acquire(blocking=False):
            for step in range(15, 17):
                states.append(moved(states[-1], 0.05, step))
                writer.publish(rows_of(states[-1]), step)
            gc(log, keep_versions=1, grace_s=0)
            gc(log, keep_versions=1, grace_s=0)

    slow = WeightLog.open(log.url)
    slow.store = CountingStore(slow.store, before=forget)
    assert mirror(slow, open_store(tmp_path / "other", create=True)).version == 16
    assert assert_sound(tmp_path / "other", states) == [16]


def test_a_full_disk_and_then_room(written, tmp_path):
    log, _, states = written
    disk = tmp_path / "disk"
    disk.mkdir()
    kib = (log.manifest(4).anchor[0].nbytes + log.manifest(4).delta[0].nbytes) // 2048
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs root and mount")
    try:
        with pytest.raises(OSError, match="No space left on device: '.*p0"):
            mirror(log, open_store(disk))
        assert assert_sound(disk, states) == [] and not list(disk.rglob(".tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        mirror(log, open_store(disk))
        assert assert_sound(disk, states) == [4, 5, 6]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_mirrors_of_one_copy_agree(written, tmp_path):
    log, _, states = written
    store = open_store(tmp_path / "near", create=True)
    copiers = [threading.Thread(target=mirror, args=(log, store)) for _ in range(3)]
    for each in copiers:
        each.start()
    for each in copiers:
        each.join()
    assert assert_sound(tmp_path / "near", states) == [4, 5, 6]
    assert mirror_module.PARTS_AT_ONCE > 1
