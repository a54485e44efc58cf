"""Writing checkpoints: killed at any moment there is a whole one, in a folder and in a bucket."""

import os
import random
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from checkpoint_rows import TWO_RANKS, assert_whole, owned, write_on_two_ranks, write_one_rank
from gossamer.comm.store import open_store
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints, list_unfinished
from gossamer.trainer.checkpoint_writer import (
    Abandoned,
    BackgroundWrite,
    Target,
    prune_checkpoints,
    remove_checkpoint,
    take_snapshot,
)
from s3_server import S3Server, s3_environment


@pytest.fixture(scope="module")
def bucket():
    server = S3Server()
    server.put("bucket")
    with s3_environment(server.port):
        yield "s3://bucket"
    server.close()


@pytest.fixture(params=["folder", "s3"])
def root(request, tmp_path) -> str:
    if request.param == "folder":
        return str(tmp_path / "checkpoints")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def steps(root: str) -> list[tuple[int, int]]:
    found = [Checkpoint(url) for url in list_checkpoints(root)]
    return [(checkpoint.step, checkpoint.state["epoch"]) for checkpoint in found]


def begin(root: str, step: int, epoch: int) -> str:
    """What two ranks leave that are killed before rank 0 commits."""
    target = Target(root=root, step=step, epoch=epoch, rank=1, world_size=2)
    write_one_rank(target, owned(TWO_RANKS[1], step))
    return target.url


# --- which is newest, and which are kept -----------------------------------------------------


def test_the_newest_is_of_the_latest_epoch_then_step(root):
    """Attempt 2 went on from step 100, whatever attempt 1 wrote after that."""
    assert list_checkpoints(root) == []
    for step, epoch in ((300, 1), (100, 1), (150, 2), (110, 2)):
        write_on_two_ranks(root, step, epoch)
    unfinished = begin(root, 400, 3)
    open_store(root).put("notes.txt", b"")
    assert steps(root) == [(100, 1), (300, 1), (110, 2), (150, 2)]
    assert list_unfinished(root) == [unfinished]
    for url in list_checkpoints(root):
        assert_whole(url)


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_keeps_the_newest_and_nothing_half_written(root, keep):
    written = [write_on_two_ranks(root, *which) for which in ((300, 1), (110, 2), (120, 2))]
    unfinished, being_written = begin(root, 130, 1), begin(root, 130, 2)
    prune_checkpoints(root, keep, written[-1])
    assert list_checkpoints(root) == written[-keep:]
    assert list_unfinished(root) == [being_written]
    assert open_store(root).list(unfinished.removeprefix(f"{root}/") + "/") == []
    for url in written[-keep:]:
        assert_whole(url)


def test_what_was_found_torn_is_removed_and_not_counted(root):
    written = [write_on_two_ranks(root, step, 1) for step in (2, 4)]
    newest = write_on_two_ranks(root, 4, 2)
    prune_checkpoints(root, 2, newest, torn=[written[1]])
    assert list_checkpoints(root) == [written[0], newest]


def test_removing_can_be_cut_off_and_done_again(root):
    url = write_on_two_ranks(root)
    name = url.removeprefix(f"{root}/")
    open_store(root).delete(f"{name}/manifest.json")
    assert (list_checkpoints(root), list_unfinished(root)) == ([], [url])
    for _ in range(2):
        remove_checkpoint(url)
        assert open_store(root).list("") == open_store(root).list(f"{name}/") == []
    if "://" not in root:
        assert list(Path(root).iterdir()) == []


def test_a_checkpoint_is_written_once(root):
    url = write_on_two_ranks(root)
    with pytest.raises(FileExistsError, match="shard-00000-00000.safetensors exists already"):
        write_on_two_ranks(root)
    assert_whole(url)


# --- in a thread -----------------------------------------------------------------------------


def start(root: str, rank: int = 0, world_size: int = 1, **more: object) -> BackgroundWrite:
    target = Target(root=root, step=40, epoch=2, rank=rank, world_size=world_size)
    calls = {"may_commit": lambda: None, "then": lambda: None, **more}
    rows = owned(sum(TWO_RANKS, []) if world_size == 1 else TWO_RANKS[rank])
    write = BackgroundWrite(target, take_snapshot(rows, rank), "{}", **calls)
    write.start()
    return write


def test_rank_0_commits_once_all_shards_are_there(root):
    first = start(root, rank=0, world_size=2)
    time.sleep(0.3)
    assert first.is_alive() and list_checkpoints(root) == []
    second = start(root, rank=1, world_size=2)
    second.join()
    first.join()
    assert (first.fault, second.fault) == ("", "")
    assert_whole(list_checkpoints(root)[0])
    files = [name for name in open_store(list_checkpoints(root)[0]).list("") if "-0000" in name]
    sizes = [open_store(list_checkpoints(root)[0]).size(n) for n in files if "tensors" in n]
    assert first.num_bytes == sum(sizes) > second.num_bytes > 0


def test_it_writes_what_was_there_when_it_was_begun(tmp_path):
    values = torch.arange(7.0)
    snapshot = take_snapshot([Owned("b", (7,), 0, 7, values, {})], 0)
    assert sum(t.nbytes for t in snapshot.tensors.values()) == 28 + torch.get_rng_state().nbytes
    values.zero_()
    target = Target(root=str(tmp_path), step=1, epoch=1)
    write = BackgroundWrite(target, snapshot, "{}", lambda: None, lambda: None)
    write.run()
    assert torch.equal(Checkpoint(target.url).rows("b", 0, 7), torch.arange(7.0))
    assert snapshot.tensors == {}  # given back as it was written


def test_one_that_is_given_up_ends_without_a_commit(root):
    write = start(root, rank=0, world_size=2)
    write.abandon()
    write.join(60)
    assert not write.is_alive() and isinstance(write.error, Abandoned)
    assert list_checkpoints(root) == [] and len(list_unfinished(root)) == 1


def test_ranks_that_share_no_place_are_told(tmp_path, monkeypatch):
    """A local folder on two machines."""
    monkeypatch.setattr("gossamer.trainer.checkpoint_writer.SHARDS_S", 0.2)
    writes = [start(str(tmp_path / str(rank)), rank, world_size=2) for rank in (0, 1)]
    for write in writes:
        write.join()
    expected = "shard-00001.json did not come within 0.2 s; expected a checkpoint.url that all"
    assert writes[0].fault.startswith(expected) and writes[1].fault == ""


def test_a_stale_writer_commits_nothing(root):
    def refuse() -> None:
        raise RuntimeError("a later one has begun")

    write = start(root, may_commit=refuse)
    write.join()
    assert write.fault == "a later one has begun" and list_checkpoints(root) == []


@pytest.mark.parametrize("at", ["no such bucket", "a file in the way"])
def test_a_store_that_fails_is_told_of(at, tmp_path, request):
    (tmp_path / "file").touch()
    bucket = request.getfixturevalue("bucket")
    bad = f"{bucket}-none/x" if at == "no such bucket" else str(tmp_path / "file" / "x")
    write = start(bad)
    write.join()
    assert isinstance(write.error, OSError) and "\n" not in write.fault
    assert ("no such bucket" if "none" in bad else "Not a directory") in write.fault


# --- killed ----------------------------------------------------------------------------------


def write_until_killed(root: str, rank: int) -> None:
    """Steps 1, 2, ... in a thread, as fast as they go; rank 0 keeps two."""
    last = ""
    for step in range(1, 10_000):
        while rank and last and not Path(root, last, "manifest.json").exists():
            time.sleep(0.001)  # as the step sees to it
        target = Target(root=root, step=step, epoch=1, rank=rank, world_size=2)
        snapshot = take_snapshot(owned(TWO_RANKS[rank], step), rank)
        state = f'{{"progress": {{"step": {step}}}}}'
        prune = partial(prune_checkpoints, root, 2, target.url)
        write = BackgroundWrite(target, snapshot, state, lambda: None, prune)
        write.start()
        write.join()
        last = target.name
        if write.error:
            raise write.error


def kill_often(root: str, kills: int) -> None:
    """Forks two ranks that write, kills them at random moments, apart from each other."""
    torch.set_num_threads(1)
    moments = random.Random(7)
    os.setpgrp()  # so that it can be ended with its ranks
    for number in range(kills):
        ranks = []
        for rank in (0, 1):
            pid = os.fork()
            if not pid:
                write_until_killed(f"{root}/{number}", rank)
                os._exit(0)
            ranks.append(pid)
        time.sleep(moments.uniform(0.02, 0.5))
        moments.shuffle(ranks)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            time.sleep(moments.choice([0, 0.03]))
        signals = [os.WTERMSIG(os.waitpid(pid, 0)[1]) for pid in ranks]
        assert signals == [signal.SIGKILL] * 2


def killed_and_looked_at(root: Path, kills: int) -> list[str]:
    """What was found after each kill: that is whole, and what a next attempt leaves."""
    process = mp.get_context("spawn").Process(target=kill_often, args=(str(root), kills))
    process.start()
    try:
        process.join(600)
        assert process.exitcode == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    states = []
    for number in range(kills):
        place = str(root / str(number))
        found, unfinished = list_checkpoints(place), list_unfinished(place)
        for url in found:
            assert_whole(url)
        assert len(found) <= 3 and len(unfinished) <= 2
        states.append(f"{len(found)} whole, {len(unfinished)} unfinished")
        resumed = write_on_two_ranks(place, step=3, epoch=2)
        prune_checkpoints(place, 2, resumed)
        assert list_checkpoints(place) == [*found[-1:], resumed]
        names = {Path(url).name for url in (*found[-1:], resumed)}
        # but for an empty folder, or a marker's temporary file, where the kill came that early
        left = {p.name for p in Path(place).glob("step-*") if p.is_file() or any(p.iterdir())}
        assert left == names | {f"{name}.begun" for name in names}
    return states


def test_killed_at_any_moment_the_newest_is_whole(tmp_path):
    states = killed_and_looked_at(tmp_path, kills=5)
    assert sum("0 unfinished" not in state for state in states) >= 2, states


@pytest.mark.slow
def test_killed_very_often(tmp_path):
    states = killed_and_looked_at(tmp_path, kills=50)
    assert sum("0 unfinished" not in state for state in states) >= 25, states
