"""SIGKILL before every system call of a publish, a takeover, a fold and a collection, and before
every line of a reader's stage and commit: whoever comes next finds the old state or the new one."""

import builtins
import mmap
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from gossamer.comm import live as live_module
from gossamer.comm.fold import fold
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import read_state
from gossamer.comm.retention import gc
from gossamer.comm.subscriber import Subscriber
from gossamer.comm.verify import verify
from toy_weights import CONFIG, SMALL, moved, new_writer, rows_of, same_bits, toy_state, zeros

CALLS = (
    "open write fsync link replace rename unlink remove mkdir close stat listdir scandir".split()
)


class Fuse:
    """Kills the process in place of its `calls`-th step."""

    def __init__(self, calls):
        self.calls = calls

    def step(self):
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls -= 1

    def counted(self, function):
        def call(*arguments, **options):
            self.step()
            return function(*arguments, **options)

        return call

    def arm_calls(self):
        for name in CALLS:
            setattr(os, name, self.counted(getattr(os, name)))
        opened = self.counted(builtins.open)
        builtins.open = lambda *arguments, **options: File(opened(*arguments, **options), self)

    def arm_lines(self, path):
        def trace(frame, event, _):
            if frame.f_code.co_filename == path:
                if event == "line":
                    self.step()
                return trace

        sys.settrace(trace)


class File:
    """A file whose writes may stop half-way."""

    def __init__(self, file, fuse):
        self._file, self._fuse = file, fuse

    def write(self, data):
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self._file.write(part)
            self._file.flush()
            self._fuse.step()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._fuse.step()
        self._file.close()


def is_killed(arm, work):
    """Runs `work` in a fork; False when it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)
            arm()
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the child ended with status {status}"
    return status != 0


def sweep(folder, arm_of, work, check, is_reader=False):
    """Kills `work` at its first step, its second, ...; `check` sees the folder after each."""
    saved = folder.with_name("saved")
    shutil.copytree(folder, saved)
    kills = 0
    while True:
        killed = is_killed(partial(arm_of, Fuse(kills)), work)
        check(killed)
        if not killed:
            return kills
        kills += 1
        if not is_reader:
            shutil.rmtree(folder)
            shutil.copytree(saved, folder)


@pytest.fixture
def folder():
    """In memory where there is such a place: the sweeps delete a log hundreds of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield Path(place) / "log"


@pytest.fixture
def written(folder):
    log, writer = new_writer(folder)
    states = [toy_state(shapes=SMALL)]
    for step in range(4):
        writer.publish(rows_of(states[-1]), step)
        states.append(moved(states[-1], 0.3, step))
    return log, writer, states


def go_on(folder, live, head, state):
    """A follower at version 3 comes along, then a new writer takes over, then a reader is late."""
    log = WeightLog.open(folder)
    assert log.head() == head
    if head > 3:
        Subscriber(log, live).catch_up()
        assert same_bits(live.tensors, state)
        live.rollback()
    else:
        assert same_bits(read_state(log), state)
    after = moved(state, 0.3, 99)
    heir = Publisher(log, config=CONFIG, takeover=True)
    assert heir.publish(rows_of(after), 9, rewind_to_step=9).version == head + 1
    late = LiveWeights(zeros(SMALL))
    assert Subscriber(WeightLog.open(folder), late).catch_up() == head + 1
    assert same_bits(late.tensors, after)


@pytest.mark.parametrize("is_takeover", [False, True])
def test_a_writer_killed_anywhere_leaves_the_old_version_or_the_new(folder, written, is_takeover):
    log, writer, states = written
    heads = []
    live = LiveWeights(zeros(SMALL))
    Subscriber(log, live).catch_up()

    def work():
        if is_takeover:
            heir = Publisher(WeightLog.open(folder), config=CONFIG, takeover=True)
            heir.publish(rows_of(states[4]), 4)
        else:
            writer.publish(rows_of(states[4]), 4)  # version 4: a delta and an anchor

    def check(killed):
        heads.append(WeightLog.open(folder).head())
        assert killed or heads[-1] == 4
        go_on(folder, live, heads[-1], states[heads[-1]])

    kills = sweep(folder, Fuse.arm_calls, work, check)
    assert heads == sorted(heads) and set(heads) == {3, 4}
    assert heads[-2] == 4 and kills > 30  # also killed behind the commit, and in many places


def test_a_collector_killed_anywhere_breaks_no_reader(folder, written):
    _, writer, states = written
    writer.publish(rows_of(states[4]), 4)

    def check(_):
        log = WeightLog.open(folder)
        live = LiveWeights(zeros(SMALL))
        assert Subscriber(log, live).catch_up() == 4
        assert same_bits(live.tensors, states[4])
        gc(log, 1, grace_s=0)
        assert log.versions() == [4] and len(log.store.list("parts/")) == 2

    sweep(folder, Fuse.arm_calls, lambda: gc(WeightLog.open(folder), 1, grace_s=0), check)


def test_a_fold_that_is_killed_anywhere_is_not_there_or_whole(folder, written):
    _, _, states = written
    live, seen = LiveWeights(zeros(SMALL)), set()
    subscriber = Subscriber(WeightLog.open(folder), live)
    subscriber.commit(subscriber.fetch_and_stage(0))

    def check(_):
        log = WeightLog.open(folder)
        seen.add(log.next_version(0))
        assert Subscriber(log, live).catch_up() == 3
        assert same_bits(live.tensors, states[3])
        if not log.folds():
            fold(log, 0, 3)
        assert verify(log).faults == []
        live.commit(live.stage(log.manifest(0), [log.read_part(log.manifest(0).anchor[0])]))

    sweep(folder, Fuse.arm_calls, lambda: fold(WeightLog.open(folder), 0, 3), check)
    assert seen == {1, 3}


@pytest.mark.parametrize("by", ["calls", "lines"])
def test_a_reader_killed_anywhere_harms_nobody_and_its_heir_heals_torn_tensors(folder, written, by):
    _, writer, states = written
    writer.publish(rows_of(states[4]), 4)  # with an anchor, where the heir begins
    shared = {}
    for name, shape in SMALL.items():  # memory that outlives the reader
        size = torch.Size(shape).numel()
        memory = mmap.mmap(-1, 2 * size)
        shared[name] = torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)
    live = LiveWeights(shared)
    subscriber = Subscriber(WeightLog.open(folder), live)
    for version in range(4):
        subscriber.commit(subscriber.fetch_and_stage(version))
    seen = set()

    def arm(fuse):
        return fuse.arm_calls() if by == "calls" else fuse.arm_lines(live_module.__file__)

    def check(killed):
        seen.add(
            "old"
            if same_bits(shared, states[3])
            else "new"
            if same_bits(shared, states[4])
            else "torn"
        )
        assert killed or same_bits(shared, states[4])
        heir = LiveWeights(shared)
        assert Subscriber(WeightLog.open(folder), heir).catch_up() == 4
        assert same_bits(shared, states[4])
        assert heir.audit() == WeightLog.open(folder).manifest(4).state_hash
        for name, values in states[3].items():
            shared[name].copy_(values)

    sweep(folder, arm, subscriber.catch_up, check, is_reader=True)
    assert seen == ({"old", "new"} if by == "calls" else {"old", "torn", "new"})
