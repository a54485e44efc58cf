"""What goes along in a round: routing biases, experts without tokens, and every kind of phase."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from gossamer.comm.outer.message import unpack_message
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from outer_runs import Running, finish, hashes, settings
from tiny_families import hf_fields
from tiny_run import SETTINGS, events

BIAS = "e_score_correction_bias"


def last(run_dir: Path) -> Checkpoint:
    return Checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])


@pytest.mark.slow
def test_routing_biases_are_averaged_and_alike_on_all_ranks(tmp_path):
    """One replica has two ranks; its biases are the first rank's, and all ranks route by them."""
    running = []
    for index, name in enumerate("ab"):
        config = settings(name, index, 2, tmp_path / "rounds", rule="averaging", inner_steps=4)
        own = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer's
        config["model"]["hf"] = {k: v for k, v in hf_fields("deepseek_v3").items() if k not in own}
        config["model"]["moe"] = {"bias_update_rate": 0.01}
        if index == 0:
            config["parallel"] = {"expert": 2, "zero_stage": 1}
        running.append(Running(tmp_path / name, config))
    finish(*running)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    one, other = last(tmp_path / "a"), last(tmp_path / "b")
    names = [name for name in one.shapes if name.endswith(BIAS)]
    assert names
    for name in names:
        bias = one.rows(name, 0, one.shapes[name][0])
        assert torch.equal(bias, other.rows(name, 0, other.shapes[name][0])) and bias.any()
        # each replica moved it by 4 steps of 0.01 a round, up or down: the mean is half of those
        steps = bias / 0.005
        assert (steps - steps.round()).abs().max() < 1e-3 and (steps.round() % 2 == 1).any()


def test_an_expert_without_a_token_sends_nothing(tmp_path):
    config = settings("a", 0, 1, tmp_path / "rounds", rule="averaging", inner_steps=1)
    config["model"]["hf"] |= {"num_experts": 64, "num_experts_per_tok": 1}
    config["data"] |= {"num_rows": 1, "seq_len": 32}
    config["phases"][0]["max_steps"] = 2
    config["optim"] = {"weight_decay": 0.1}  # it moves weights that no token moved
    config["metrics"]["expert_load_every_steps"] = 1
    finish(Running(tmp_path / "a", config))
    checkpoint = last(tmp_path / "a")
    (path,) = (tmp_path / "rounds/rounds/00000001").glob("a-*.message")
    sent = {each.run.name for each in unpack_message(path.read_bytes(), checkpoint.shapes).sent}
    load = events(tmp_path / "a", "train_step")[1]["expert_load"]
    names = [
        (name, load[int(parts[2])][int(parts[5])])
        for name in checkpoint.shapes
        for parts in [name.split(".")]
        if ".experts." in name
    ]
    assert len(names) == 2 * 64 * 3 and any(count for _, count in names)
    assert {name for name, count in names if count} == sent & {name for name, _ in names}


@pytest.mark.slow
def test_replicas_learn_by_rl_and_engines_hold_the_shared_weights(tmp_path):
    """Rounds of two in phases of three and four: one of them begins in text and ends in RL."""
    running = []
    for index, name in enumerate("ab"):
        config = settings(name, index, 2, tmp_path / "rounds")
        for section in ("task", "rl"):
            config[section] = deepcopy(SETTINGS[section])
        config["data"]["task_share"] = SETTINGS["data"]["task_share"]
        config["phases"] = deepcopy(SETTINGS["phases"])
        config["phases"][0]["max_steps"], config["phases"][1]["max_steps"] = 3, 4
        config["seed"] = 5
        running.append(Running(tmp_path / name, config))
    finish(*running)
    found = hashes(tmp_path / "a")
    # the last round is shorter: it ends with the run
    assert found == hashes(tmp_path / "b") and sorted(found) == [1, 2, 3, 4]
    assert [e["step"] for e in events(tmp_path / "a", "outer_round")] == [2, 4, 6, 7]
    audits = [events(tmp_path / name, "audit") for name in "ab"]
    assert all(audit["equal"] for each in audits for audit in each)
    # both published the same weights at last, by logs of their own
    assert audits[0][0]["state_hash"] == audits[1][0]["state_hash"]
