"""The saver: the step goes on while it writes, says when a write failed, and where it resumes."""

import os
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoint_rows import TWO_RANKS, assert_whole, owned, write_on_two_ranks
from gloo_world import run_world
from gossamer.comm.log import WeightLog
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import list_checkpoints
from gossamer.trainer.config import CheckpointConfig
from gossamer.trainer.saving import Progress, Saver, open_whole
from s3_server import S3Server, s3_environment


class RowsEngine:
    """Rows of checkpoint_rows' two tensors, of which every step makes others."""

    def __init__(self):
        self.num_updates = 0

    def owned(self, with_moments: bool) -> list[Owned]:
        assert with_moments
        return owned(TWO_RANKS[dist.get_rank()], self.num_updates)


class NoModel:
    def buffers(self) -> dict:
        return {}


def saver_in(root: str, folder: str, events: list, **options: object) -> tuple[Saver, RowsEngine]:
    engine, log = RowsEngine(), WeightLog.open(f"{folder}/log", create=True)
    config = CheckpointConfig(**{"keep_last": 2, **options})
    return Saver(config, root, 1, engine, NoModel(), log, events.append), engine


def step(saver: Saver, engine: RowsEngine, progress: Progress) -> None:
    saver.poll()
    progress.step += 1
    engine.num_updates = progress.step


def go_through_everything(folder: str, server: int) -> dict:
    """One world for all: starting processes is what takes the time."""
    return {
        "beside": save_beside_steps("s3://bucket/run", folder, server),
        "failed": {str(how): fail_to_save(f"{folder}/{how}", how) for how in (True, False)},
        "torn": open_each(f"{folder}/torn"),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def ranks(place) -> list[dict]:
    """What both ranks saw; the bucket is looked into before its server ends."""
    for how in ("True", "False"):
        (place / how).mkdir()
    tear_each(place / "torn")
    with closing(S3Server()) as server, s3_environment(server.port):
        server.put("bucket")
        found = run_world(go_through_everything, 2, str(place), server._process.pid)
        urls = list_checkpoints("s3://bucket/run")
        assert [url[-14:] for url in urls] == ["00000001-e0001", "00000006-e0001"]
        for url in urls:
            assert_whole(url)
    return found


def save_beside_steps(root: str, folder: str, server: int) -> dict:
    """The store stops answering for a while; the steps do not."""
    events: list[dict] = []
    saver, engine = saver_in(root, folder, events)
    progress = Progress()
    step(saver, engine, progress)
    dist.barrier()
    if dist.get_rank() == 0:
        os.kill(server, signal.SIGSTOP)
    dist.barrier()
    start_s = time.perf_counter()
    saver.save(progress, None, 7)
    seen = {"save_s": time.perf_counter() - start_s}
    for _ in range(5):
        step(saver, engine, progress)
    seen["events_while_held"], seen["step"] = len(events), progress.step
    time.sleep(0.5)
    seen["held_s"] = time.perf_counter() - start_s
    dist.barrier()  # nothing is written before both have looked
    if dist.get_rank() == 0:
        os.kill(server, signal.SIGCONT)
    saver.save(progress, None, 8)  # one in flight at most: waits for the first
    seen["events_at_next"] = [event["step"] for event in events]
    saver.wait()
    saver.save(progress, None, 8)  # nothing is new
    saver.wait()
    seen["events"] = [sorted(event.items()) for event in events]
    saver.poll()
    return seen


def test_steps_go_on_while_a_store_holds_the_write(ranks):
    for rank in ranks:
        seen = rank["beside"]
        assert seen["save_s"] < seen["held_s"] and seen["events_while_held"] == 0
        assert seen["events_at_next"] == [1] and len(seen["events"]) == 2 and seen["step"] == 6
        first, second = map(dict, seen["events"])
        assert (first["step"], first["version"], second["version"]) == (1, 7, 8)
        assert first["snapshot_s"] < seen["held_s"] < first["write_s"]
    of_all, of_one = (dict(rank["beside"]["events"][0])["bytes"] for rank in ranks)
    assert of_all > of_one > 0


def fail_to_save(folder: str, asynchronous: bool) -> dict:
    """Rank 1's disk is not one: a file lies where its folder should."""
    root, events = f"{folder}/rank-{dist.get_rank()}", []
    if dist.get_rank() == 1:
        Path(root).touch()
    saver, engine = saver_in(root, folder, events, asynchronous=asynchronous)
    progress, seen = Progress(), {}
    step(saver, engine, progress)
    try:
        saver.save(progress, None, None)
        while True:
            step(saver, engine, progress)
            time.sleep(0.02)
    except RuntimeError as error:
        seen |= {"error": str(error), "step": progress.step}
    saver._write.join(10)
    return seen | {"events": len(events), "alive": saver._write.is_alive()}


@pytest.mark.parametrize("asynchronous", ["True", "False"])
def test_a_write_that_fails_on_one_rank_ends_the_next_step_on_all(ranks, place, asynchronous):
    for rank in ranks:
        seen = rank["failed"][asynchronous]
        assert seen["error"].startswith("writing the checkpoint of step 1 failed: ")
        assert "rank-1" in seen["error"] and "\n" not in seen["error"]
        assert (seen["events"], seen["alive"]) == (0, False)
        assert asynchronous == "True" or seen["step"] == 1
    assert list_checkpoints(place / asynchronous / "rank-0") == []


# --- torn ------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS = {
    "a truncated file": ("shard-00001-00000.safetensors", cut, "does not have the bytes"),
    "a flipped bit": ("shard-00000-00003.safetensors", flip, "does not have the bytes"),
    "a missing file": ("shard-00001-00001.safetensors", Path.unlink, "is missing"),
    "a manifest that is cut": ("manifest.json", cut, "is not a checkpoint manifest"),
    "no manifest": ("manifest.json", Path.unlink, "begun and never finished"),
}


def open_each(root: str) -> dict:
    found = {}
    for number, fault in enumerate(FAULTS):
        newest = list_checkpoints(f"{root}/{number}")[-1]
        checkpoint, torn = open_whole(newest)
        found[fault] = {"step": checkpoint.step, "torn": torn}
    whole, torn = open_whole(list_checkpoints(f"{root}/whole")[-1])
    try:
        open_whole(list_checkpoints(f"{root}/none")[-1])
    except ValueError as error:
        return found | {"whole": [whole.step, len(torn)], "none": str(error)}
    return found


def tear_each(folder: Path) -> None:
    """For each fault a folder with a whole checkpoint of step 2, and a torn one of step 4."""
    write_on_two_ranks(folder / "whole", 2, 1)
    for number, (name, tear, _) in enumerate(FAULTS.values()):
        shutil.copytree(folder / "whole", folder / str(number))
        tear(Path(write_on_two_ranks(folder / str(number), 4, 1)) / name)
    flip(Path(write_on_two_ranks(folder / "none", 2, 1)) / "shard-00000-00000.safetensors")


def test_what_is_torn_is_passed_over_and_told(ranks, place):
    """On both ranks alike, whichever of them hashes the file."""
    for rank in ranks:
        seen = rank["torn"]
        assert seen["whole"] == [2, 0]
        assert seen["none"].startswith(f"no checkpoint in {place}/torn/none is whole: checkpoint")
        for fault, (name, _, said) in FAULTS.items():
            ((url, reason),) = seen[fault]["torn"].items()
            assert seen[fault]["step"] == 2
            assert url.endswith("/step-00000004-e0001") and said in reason, fault
            assert name in reason or fault == "no manifest"


@pytest.mark.parametrize("url", ["", "http://host/x", "ray://x", "ftp://x/y"])
def test_a_place_that_cannot_hold_checkpoints_is_refused(url):
    with pytest.raises(ValueError, match="checkpoint.url is .*; expected a folder or one of file"):
        CheckpointConfig(url=url)
