"""Every family through a whole run: text, RL on engines that follow the log, a kill, a resume."""

import pytest
import torch
from gloo_world import run_world
from gossamer.comm.log import WeightLog
from gossamer.comm.reader import read_state
from gossamer.launch.recipe import build_config
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from test_resume import run_until
from tiny_families import FAMILIES, SIZES
from tiny_run import SETTINGS, events

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen3_moe"}))  # test_resume has it
def test_a_killed_and_resumed_run_ends_in_the_same_bits(family, tmp_path):
    fields = {**SIZES, **FAMILIES[family], "model_type": family, "max_position_embeddings": 128}
    settings = {**SETTINGS, "model": {"hf": fields}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        prepare_run(build_config(TrainConfig, settings, "train"), folder, "test")
    run_world(run_until, 2, str(whole), None, settings)
    with pytest.raises(AssertionError, match="exit code -9"):
        run_world(run_until, 2, str(killed), 9, settings)
    run_world(run_until, 2, str(killed), None, settings)

    ends = [Checkpoint(list_checkpoints(f / "checkpoints")[-1]) for f in (whole, killed)]
    states = [read_state(WeightLog.open(folder / "log")) for folder in (whole, killed)]
    assert ends[0].shapes.keys() == ends[1].shapes.keys() == states[0].keys() == states[1].keys()
    for name, shape in ends[0].shapes.items():
        one, other = (end.read(name, 0, shape[0]).master for end in ends)
        assert torch.equal(one, other), name
        assert torch.equal(states[0][name], states[1][name]), name
    for folder in (whole, killed):
        audits = events(folder, "audit")
        assert len(audits) == 2 and all(audit["equal"] for audit in audits)
    if family == "deepseek_v3":
        bias_E = states[0][BIAS]
        assert bias_E.dtype == torch.float32
        assert 0.001 < bias_E.abs().max() < 0.0111  # eleven updates by 0.001
