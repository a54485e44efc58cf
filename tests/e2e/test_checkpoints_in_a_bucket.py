"""A run that writes into a bucket beside its steps, is killed and finds a torn checkpoint."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from gloo_world import run_world
from gossamer.comm.store import open_store
from gossamer.launch.recipe import build_config
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from s3_server import S3Server, s3_environment
from tiny_run import SETTINGS, events

LAST_STEP = 9
SETTINGS = {
    **SETTINGS,
    "phases": [{"name": "text", "kind": "next_token", "max_steps": LAST_STEP, "lr": 0.01}],
    "checkpoint": {"every_steps": 1, "keep_last": 3},
}


def learn(run_dir: str, url: str | None, attempt: int, kill_at_step: int | None) -> dict:
    """One rank of one attempt; SIGKILLs itself in update `kill_at_step`, while one is written."""
    from gossamer.launch.controller import newest_checkpoint
    from gossamer.trainer.loop import train
    from gossamer.trainer.session import RunPlace, Session

    settings = {**SETTINGS, "checkpoint": {**SETTINGS["checkpoint"], "url": url}}
    config, folder = build_config(TrainConfig, settings, "train"), Path(run_dir)
    newest = newest_checkpoint(folder, url)
    place = RunPlace(run_dir=folder, name="test", attempt=attempt, resume_from=newest)
    told: list[int] = []
    session = Session(config, place, None, on_checkpoint=told.append)
    record = session.record

    def record_and_die(*arguments) -> None:
        record(*arguments)
        time.sleep(0.2)  # or the server, which takes one request at a time, never gets done
        if session.progress.step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    session.record = record_and_die
    train(session)
    return {"told": told}


def tear(url: str) -> None:
    store = open_store(url)
    name = next(name for name in store.list("shard-") if name.endswith(".safetensors"))
    store.put(name, store.get(name)[:-1], overwrite=True)


@pytest.mark.slow
def test_killed_torn_and_resumed_it_is_the_run_that_was_never_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        prepare_run(build_config(TrainConfig, SETTINGS, "train"), folder, "test")
    told = run_world(learn, 2, str(whole), None, 1, None)
    assert told[0] == told[1] == {"told": list(range(1, LAST_STEP + 1))}

    with closing(S3Server()) as server, s3_environment(server.port):
        server.put("bucket")
        root = "s3://bucket/run"
        for attempt, kill_at_step in ((1, 4), (2, 6)):
            with pytest.raises(AssertionError, match="exit code -9"):
                run_world(learn, 2, str(killed), root, attempt, kill_at_step)
        found = list_checkpoints(root)
        tear(found[-1])
        run_world(learn, 2, str(killed), root, 3, None)
        ends = [Checkpoint(list_checkpoints(place)[-1]) for place in (whole / "checkpoints", root)]
        assert ends[0].step == ends[1].step == LAST_STEP
        assert len(list_checkpoints(root)) == 3 and found[-1] not in list_checkpoints(root)
        for name, shape in ends[0].shapes.items():
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                one, other = (end.rows(name, 0, shape[0], kind) for end in ends)
                assert torch.equal(one, other), (kind, name)

    torn = events(killed, "checkpoint_torn")
    assert any(e["checkpoint"] == found[-1] and "does not have the" in e["reason"] for e in torn)
    losses = {e["step"]: (e["loss"], e["grad_norm"]) for e in events(whole, "train_step")}
    for event in events(killed, "train_step"):
        assert (event["loss"], event["grad_norm"]) == losses[event["step"]], event["step"]
    for event in events(whole, "checkpoint"):
        assert event["bytes"] > 0 and 0 < event["snapshot_s"] and 0 < event["write_s"]
