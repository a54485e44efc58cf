import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gossamer.comm.config import LogConfig
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import LogError, StaleWriterError, WeightLog
from gossamer.comm.manifest import part_name
from gossamer.comm.publisher import PartTimeoutError, Publisher, Rows
from gossamer.comm.reader import read_state
from gossamer.comm.store import open_store
from gossamer.comm.subscriber import Subscriber
from toy_weights import CONFIG, moved, new_writer, rows_of, same_bits, toy_state, zeros

HASTY = replace(CONFIG, part_timeout_s=0.1)
PART_IN_A_PROCESS = """
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from toy_weights import CONFIG, WeightLog, Publisher, moved, rows_of, toy_state
folder, part, num_parts, epoch, versions = sys.argv[2], *map(int, sys.argv[3:])
# a process may start long after the other
config = replace(CONFIG, part_timeout_s=120)
publisher = Publisher(WeightLog.open(folder), part, num_parts, epoch, config)
state = toy_state()
for step in range(versions):
    publisher.publish(rows_of(state, part, num_parts), step)
    state = moved(state, 0.1, step)
"""


def start_part(folder, part, num_parts, epoch, versions):
    here = str(Path(__file__).parent)
    numbers = [str(each) for each in (part, num_parts, epoch, versions)]
    return subprocess.Popen([sys.executable, "-c", PART_IN_A_PROCESS, here, str(folder), *numbers])


def test_two_parts_in_two_processes_make_one_log(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    epoch = log.claim_epoch()
    parts = [start_part(tmp_path, part, 2, epoch, 6) for part in range(2)]
    assert [part.wait(timeout=300) for part in parts] == [0, 0]
    state = toy_state()
    for step in range(6):
        manifest = log.manifest(step)
        assert same_bits(read_state(log, step), state)
        assert len(manifest.delta) == (2 if step else 0)
        assert len(manifest.anchor) == (2 if step in (0, 4) else 0)
        state = moved(state, 0.1, step)


def test_a_writer_killed_between_part_and_commit_leaves_the_old_head(tmp_path):
    log, writer = new_writer(tmp_path)
    before = toy_state(9)
    writer.publish(rows_of(before), 0)
    epoch = log.claim_epoch(takeover=True)
    # part 0 of 2 puts its part, then waits for a part 1 that never starts
    doomed = start_part(tmp_path, 0, 2, epoch, 1)
    deadline = time.monotonic() + 120
    while log.store.size(part_name(1, epoch, 0, "anchor")) is None:
        assert time.monotonic() < deadline and doomed.poll() is None
        time.sleep(0.01)
    os.kill(doomed.pid, signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    assert log.head() == 0 and same_bits(read_state(log), before)

    after = moved(before, 0.2, 1)
    successor = Publisher(log, config=CONFIG, takeover=True)
    assert successor.publish(rows_of(after), 1, rewind_to_step=0).version == 1
    assert same_bits(read_state(log), after)
    assert log.manifest(1).writer_epoch == epoch + 1


def test_a_takeover_rewinds_its_followers_and_ends_the_zombie(tmp_path):
    log, zombie = new_writer(tmp_path)
    states = [toy_state()]
    live = LiveWeights(zeros())
    for step in range(3):
        zombie.publish(rows_of(states[-1]), step)
        states.append(moved(states[-1], 0.1, step))
    Subscriber(log, live).catch_up()

    heir = Publisher(log, config=CONFIG, takeover=True)
    published = heir.publish(rows_of(states[1]), 1, rewind_to_step=1)
    assert (published.version, published.kind) == (3, "anchor")
    manifest = log.manifest(3)
    assert (manifest.rewind_to_step, manifest.base_version, manifest.step) == (1, None, 1)
    with pytest.raises(StaleWriterError, match="writer epoch 1 cannot commit version 3"):
        zombie.publish(rows_of(states[3]), 3)

    branch = moved(states[1], 0.1, 50)
    assert heir.publish(rows_of(branch), 2).kind == "delta"
    follower = Subscriber(log, live)
    assert follower.next_version() == 3  # over the break by anchor, then by delta
    assert [log.next_version(live_at) for live_at in (None, 0, 3, 4)] == [3, 3, 4, None]
    assert follower.catch_up() == 4
    assert same_bits(live.tensors, branch)
    assert same_bits(read_state(log, 2), states[2])


def test_a_zombie_that_lost_the_race_for_a_number_is_told(tmp_path):
    """The claim is not seen yet: only create-if-absent stands between the two."""
    log, zombie = new_writer(tmp_path)
    state = toy_state()
    zombie.publish(rows_of(state), 0)
    Publisher(log, 0, 1, 2, CONFIG).publish(rows_of(state), 0)
    with pytest.raises(StaleWriterError, match="version 1 was committed by writer epoch 2"):
        zombie.publish(rows_of(moved(state, 0.1, 1)), 1)
    assert same_bits(read_state(log), state)


def test_an_heir_that_lost_the_race_for_a_number_takes_the_next(tmp_path):
    log, zombie = new_writer(tmp_path)
    state = toy_state()
    zombie.publish(rows_of(state), 0)
    heirs = [Publisher(log, part, 2, 2, CONFIG) for part in range(2)]
    published = []
    first = threading.Thread(
        target=lambda: published.append(heirs[0].publish(rows_of(state, 0, 2), 0))
    )
    first.start()
    while log.store.size(part_name(1, 2, 0, "anchor")) is None:
        time.sleep(0.001)
    zombie.publish(rows_of(moved(state, 0.1, 1)), 1)
    published.append(heirs[1].publish(rows_of(state, 1, 2), 0))
    first.join()
    assert [each.version for each in published] == [2, 2]
    assert [log.manifest(version).writer_epoch for version in range(3)] == [1, 1, 2]
    assert same_bits(read_state(log), state)


def test_two_writers_of_one_epoch_do_not_mix(tmp_path):
    log, writer = new_writer(tmp_path)
    state = toy_state()
    writer.publish(rows_of(state), 0)
    twin = Publisher(log, 0, 1, 1, CONFIG)
    twin.publish(rows_of(state), 1)
    with pytest.raises(StaleWriterError, match="version 1 was committed|exists already"):
        writer.publish(rows_of(moved(state, 0.1, 1)), 1)
    assert same_bits(read_state(log), state)


def test_a_part_that_stays_away_is_named(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    epoch = log.claim_epoch()
    parts = [Publisher(log, part, 3, epoch, HASTY) for part in range(3)]
    with pytest.raises(PartTimeoutError, match="manifest-00000000.json"):
        parts[1].publish(rows_of(toy_state(), 1, 3), 0)
    with pytest.raises(PartTimeoutError, match=r"for parts/00000000-e0001-p2\.anchor$"):
        parts[0].publish(rows_of(toy_state(), 0, 3), 0)
    assert log.head() is None
    with pytest.raises(StaleWriterError, match="p1.anchor exists already: .* left version 0 open"):
        parts[1].publish(rows_of(toy_state(1), 1, 3), 0)
    with pytest.raises(PartTimeoutError):  # the same again may go on, once all are there
        parts[1].publish(rows_of(toy_state(), 1, 3), 0)


def test_parts_of_different_steps_are_not_committed(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    epoch = log.claim_epoch()
    parts = [Publisher(log, part, 2, epoch, HASTY) for part in range(2)]
    with pytest.raises(PartTimeoutError):
        parts[1].publish(rows_of(toy_state(), 1, 2), 7)
    with pytest.raises(LogError, match=r"p1\.anchor has step 7, expected 8"):
        parts[0].publish(rows_of(toy_state(), 0, 2), 8)
    assert log.head() is None


def test_rows_must_be_those_of_the_last_version(tmp_path):
    log, writer = new_writer(tmp_path)
    state = toy_state()
    rows = list(rows_of(state))
    with pytest.raises(LogError, match="do not add up: model.embed_tokens.weight has rows up to"):
        new_writer(tmp_path / "gap")[1].publish(rows[1:], 0)
    writer.publish(rows, 0)
    with pytest.raises(ValueError, match="rows of model.norm.weight from 0 on were published"):
        writer.publish(rows[:-1], 1)
    with pytest.raises(ValueError, match="22 rows of model.embed_tokens.weight from 128 on were"):
        recast = replace(rows[2], values=rows[2].values.half())
        writer.publish([*rows[:2], recast, *rows[3:]], 1)
    bad = [
        (replace(rows[0], row_start=140), "are not rows of"),
        (replace(rows[0], values=rows[0].values[:, :3]), "are not rows of"),
        (replace(rows[0], values=rows[0].values.double()), "dtype must be one of"),
        (replace(rows[0], values=rows[0].values[::2]), "expected a contiguous tensor"),
        (Rows("empty", (0, 3), 0, torch.zeros(0, 3)), "holds no element"),
    ]
    for each, message in bad:
        with pytest.raises(ValueError, match=message):
            writer.publish([each, *rows[1:]], 1)
    after = moved(state, 0.1, 3)
    assert writer.publish(rows_of(after), 1).version == 1  # none of that moved the base
    assert same_bits(read_state(log), after)


def test_the_base_is_the_publishers_own_copy(tmp_path):
    log, writer = new_writer(tmp_path)
    state = toy_state()
    writer.publish(rows_of(state), 0)
    for values in state.values():
        values.view(torch.int16)[0] += 1
    published = writer.publish(rows_of(state), 1)
    assert published.num_changed == sum(values[0].numel() for values in state.values())
    assert same_bits(read_state(log), state)


def test_books_are_the_bytes_written(tmp_path):
    log, writer = new_writer(tmp_path)
    state = toy_state()
    for step in range(5):
        published = writer.publish(rows_of(state), step)
        manifest = log.manifest(step)
        sizes = {
            kind: (tmp_path / part_name(step, 1, 0, kind)).stat().st_size
            for kind in ("delta", "anchor")
            if getattr(manifest, kind)
        }
        assert published.frame_bytes == sizes[published.kind]
        assert published.anchor_bytes == (sizes["anchor"] if step == 4 else 0)
        assert published.full_bytes == manifest.full_bytes == 2 * manifest.num_elements
        assert published.num_elements == manifest.num_elements
        assert published.num_changed == manifest.num_changed
        assert (manifest.step, manifest.num_tensors) == (step, len(state))
        assert bool(published.runs_by_choice) == bool(published.bytes_by_codec) == (step > 0)
        assert sum(published.bytes_by_codec.values()) < published.frame_bytes
        state = moved(state, 0.1, step)


def test_a_store_that_fails_moves_no_base(tmp_path):
    log, writer = new_writer(tmp_path)
    state = toy_state()
    writer.publish(rows_of(state), 0)
    after = moved(state, 0.1, 1)
    (tmp_path / "parts").rename(tmp_path / "away")
    (tmp_path / "parts").touch()
    with pytest.raises(OSError, match="parts"):
        writer.publish(rows_of(after), 1)
    (tmp_path / "parts").unlink()
    (tmp_path / "away").rename(tmp_path / "parts")
    assert log.head() == 0
    assert writer.publish(rows_of(after), 1).version == 1
    assert same_bits(read_state(log), after)


@pytest.mark.parametrize("broken", ["delta", "anchor", "manifest"])
def test_a_publish_that_failed_may_be_made_again(tmp_path, broken):
    log, writer = new_writer(tmp_path, replace(CONFIG, anchor_every_versions=1))
    state, put = toy_state(), log.store.put
    writer.publish(rows_of(state), 0)
    state = moved(state, 0.1, 1)

    def failing(name, data, overwrite=False):
        if broken in name:
            raise OSError("the store is away")
        return put(name, data, overwrite)

    for _ in range(2):
        log.store.put = failing
        with pytest.raises(OSError, match="the store is away"):
            writer.publish(rows_of(state), 1)
        assert log.head() == 0
    log.store.put = put
    assert writer.publish(rows_of(state), 1).version == 1
    assert same_bits(read_state(log), state)


def test_a_part_may_be_empty_and_a_version_without_a_change(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    epoch = log.claim_epoch()
    state = toy_state()

    def publish(part, rows):
        publisher = Publisher(log, part, 2, epoch, CONFIG)
        for step in range(5):
            publisher.publish(rows, step)

    idle = threading.Thread(target=publish, args=(1, []))
    idle.start()
    publish(0, list(rows_of(state)))
    idle.join()
    manifest = log.manifest(4)
    assert (manifest.num_changed, len(manifest.delta), len(manifest.anchor)) == (0, 2, 2)
    live = LiveWeights(zeros())
    subscriber = Subscriber(log, live)
    for version in range(5):
        subscriber.commit(subscriber.fetch_and_stage(version))
    assert same_bits(live.tensors, state)


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs root and mount")
    try:
        log, writer = new_writer(disk)
        state = toy_state()
        writer.publish(rows_of(state), 0)
        ballast = disk / "ballast"
        free = os.statvfs(disk)
        ballast.write_bytes(bytes((free.f_bavail - 1) * free.f_frsize))
        before = sorted(path.name for path in disk.rglob("*"))
        after = moved(state, 0.9, 1)
        with pytest.raises(OSError, match="No space left on device: '.*p0.delta'"):
            writer.publish(rows_of(after), 1)
        store = open_store(disk)
        for overwrite in (True, False):
            with pytest.raises(OSError, match="No space left"):
                store.put("HEAD" if overwrite else "new", bytes(100_000), overwrite)
        assert sorted(path.name for path in disk.rglob("*")) == before
        assert log.head() == 0 and same_bits(read_state(log), state)
        ballast.unlink()
        assert writer.publish(rows_of(after), 1).version == 1
        assert same_bits(read_state(log), after)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_config_that_cannot_be_right_is_refused():
    for field, value in [
        ("publish_dtype", "float64"),
        ("anchor_every_versions", 0),
        ("anchor_every_bytes", -1),
        ("zstd_level", 0),
        ("part_timeout_s", 0.0),
        ("poll_s", -1.0),
    ]:
        with pytest.raises(ValueError, match=f"^{field} must be"):
            LogConfig(**{field: value})
    with pytest.raises(ValueError, match="part must be from 0 to 1, not 2"):
        Publisher(None, 2, 2, 1, CONFIG)


def test_anchors_come_by_bytes_too(tmp_path):
    config = replace(CONFIG, anchor_every_versions=100, anchor_every_bytes=6000)
    log = WeightLog.open(tmp_path, create=True)
    epoch, state = log.claim_epoch(), toy_state()

    def publish(part):
        publisher, own = Publisher(log, part, 2, epoch, config), state
        for step in range(12):
            publisher.publish(rows_of(own, part, 2), step)
            own = moved(own, 0.1, step)

    other = threading.Thread(target=publish, args=(1,))
    other.start()
    publish(0)
    other.join()
    since = 0
    for version in range(1, 12):
        manifest = log.manifest(version)
        assert bool(manifest.anchor) == (since >= 6000)
        since = 0 if manifest.anchor else since + sum(ref.nbytes for ref in manifest.delta)
    assert 1 < sum(bool(log.manifest(version).anchor) for version in range(12)) <= 6
