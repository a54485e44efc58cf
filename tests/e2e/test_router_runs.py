"""Routers with a schedule through a kill and a resume: the same bits as without."""

import json

import pytest
import torch
from gloo_world import run_world
from gossamer.launch.recipe import build_config
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from test_resume import run_until
from tiny_run import SETTINGS, events

CASES = {
    # checkpoints are at 2, 4, ...: one kill comes right after the experts were copied
    "dense_to_sparse": {"dense_to_sparse": {"diversify_steps": 2, "decay_steps": 3}},
    "smoe_dropout": {"smoe_dropout": {"grow_steps": 5}},
    "sigmoid_bias": {"z_loss_coef": 0.001, "balance_scope": "sequence"},
}


@pytest.mark.slow
@pytest.mark.parametrize("router", CASES)
def test_a_killed_and_resumed_schedule_ends_in_the_same_bits(router, tmp_path):
    moe = {**CASES[router], "trace_path": "trace", "trace_steps": 2}
    settings = {
        **SETTINGS,
        "model": {**SETTINGS["model"], "router": router, "moe": moe},
        "phases": [{"name": "text", "kind": "next_token", "max_steps": 7, "lr": 0.01}],
        "metrics": {"wandb_mode": "disabled", "expert_load_every_steps": 1},
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        prepare_run(build_config(TrainConfig, settings, "train"), folder, "test")
    run_world(run_until, 2, str(whole), None, settings)
    for kill_at_step in (3, 5):
        with pytest.raises(AssertionError, match="exit code -9"):
            run_world(run_until, 2, str(killed), kill_at_step, settings)
    run_world(run_until, 2, str(killed), None, settings)

    steps = {e["step"]: (e["loss"], e["expert_load"]) for e in events(whole, "train_step")}
    assert len(steps) == 7
    for event in events(killed, "train_step"):
        assert (event["loss"], event["expert_load"]) == steps[event["step"]], event["step"]
    ends = [Checkpoint(list_checkpoints(f / "checkpoints")[-1]) for f in (whole, killed)]
    for name, shape in ends[0].shapes.items():
        one, other = (end.read(name, 0, shape[0]).master for end in ends)
        assert torch.equal(one, other), name
    for rank in (0, 1):
        lines = (whole / "trace" / f"router_trace_rank{rank}.jsonl").read_text().splitlines()
        assert {json.loads(line)["step"] for line in lines} == {0, 1}
