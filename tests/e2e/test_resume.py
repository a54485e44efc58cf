"""A run that is killed three times and resumed is the run that was never killed (DECISIONS 9)."""

import os
import signal
from pathlib import Path

import pytest
import torch
from gloo_world import run_world
from gossamer.comm.log import WeightLog
from gossamer.launch.recipe import build_config
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from tiny_run import SETTINGS, events

LAST_STEP = 11


def run_until(run_dir: str, kill_at_step: int | None, settings: dict = SETTINGS) -> dict:
    """One rank of one attempt; SIGKILLs itself after recording update `kill_at_step`.

    At the last step: only once the last checkpoint is written, before the engines are audited.
    """
    from gossamer.launch.controller import newest_checkpoint
    from gossamer.trainer.loop import train
    from gossamer.trainer.model import hf_config
    from gossamer.trainer.prepare import load_run_tokenizer
    from gossamer.trainer.session import RunPlace, Session
    from gossamer.trainer.tokenizer import token_fields
    from local_rollouts import LocalRollouts

    config, folder = build_config(TrainConfig, settings, "train"), Path(run_dir)
    rollouts = None
    if torch.distributed.get_rank() == 0:
        tokens = token_fields(load_run_tokenizer(folder).vocab_size)
        rollouts = LocalRollouts(folder, hf_config(config.model, tokens).to_dict(), 2)
    newest = newest_checkpoint(folder, config.checkpoint.url)
    place = RunPlace(run_dir=folder, name="test", resume_from=newest)
    session = Session(config, place, rollouts, on_checkpoint=lambda step: None)
    name = "end_phase" if kill_at_step == LAST_STEP else "record"
    step = getattr(session, name)

    def step_and_die(*arguments) -> None:
        step(*arguments)
        if session.progress.step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(session, name, step_and_die)
    train(session)
    return {"step": session.progress.step}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    config = build_config(TrainConfig, SETTINGS, "train")
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    for folder in (whole, killed):
        prepare_run(config, folder, "test")
    run_world(run_until, 2, str(whole), None)
    # in the middle of a checkpoint interval of each phase, and when only the proof is missing
    for kill_at_step in (3, 9, LAST_STEP):
        with pytest.raises(AssertionError, match="exit code -9"):
            run_world(run_until, 2, str(killed), kill_at_step)
    run_world(run_until, 2, str(killed), None)
    return whole, killed


def test_every_step_and_the_final_state_are_the_same_bits(runs):
    whole, killed = runs
    losses = {e["step"]: (e["loss"], e["grad_norm"]) for e in events(whole, "train_step")}
    redone = [e["step"] for e in events(killed, "train_step")]
    assert redone == [1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11]
    for event in events(killed, "train_step"):
        assert (event["loss"], event["grad_norm"]) == losses[event["step"]], event["step"]
    ends = [Checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in runs]
    assert [end.step for end in ends] == [11, 11]
    for name, shape in ends[0].shapes.items():
        one, other = (end.read(name, 0, shape[0]) for end in ends)
        assert torch.equal(one.master, other.master), name
        assert torch.equal(one.moments["exp_avg"], other.moments["exp_avg"]), name
        assert torch.equal(one.moments["exp_avg_sq"], other.moments["exp_avg_sq"]), name


def test_rl_trains_on_the_same_samples_and_learns(runs):
    whole, killed = runs
    steps = [e for e in events(whole, "train_step") if "reward_mean" in e]
    rewards = {e["step"]: e["reward_mean"] for e in steps}
    assert len(rewards) == 5 and len(set(rewards.values())) > 1
    for event in events(killed, "train_step"):
        if "reward_mean" in event:
            assert event["reward_mean"] == rewards[event["step"]]
            assert event["staleness_mean"] == 0.0
    assert all(e["grad_norm"] > 0 for e in steps)


def test_no_version_is_used_twice_and_engines_end_bit_exact(runs):
    whole, killed = runs
    log = WeightLog.open(killed / "log")
    manifests = [log.manifest(version) for version in range(log.head() + 1)]
    # published at steps 6 to 9, killed, taken over at the checkpoint of step 8; again at the last
    assert [m.step for m in manifests] == [6, 7, 8, 9, 8, 9, 10, 11, 11]
    assert [m.rewind_to_step for m in manifests] == [None] * 4 + [8] + [None] * 3 + [11]
    assert [m.writer_epoch for m in manifests] == [2] * 4 + [3] * 4 + [4]
    reference = WeightLog.open(whole / "log")
    assert manifests[-1].state_hash == reference.manifest(reference.head()).state_hash
    for folder in runs:
        audits = events(folder, "audit")
        assert len(audits) == 2 and all(audit["equal"] for audit in audits)
