"""A replica of several ranks, in every ZeRO stage, beside one of a single rank; and DGC."""

import signal
import socket
from pathlib import Path

import pytest
import torch
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TrainConfig
from outer_runs import INNER_STEPS, STEPS, Fault, Running, finish, hashes, settings
from test_outer_resume import assert_same, last_state
from tiny_run import events

LAYOUTS = {
    f"{name}, ZeRO-{stage}": {"data": data, "expert": expert, "zero_stage": stage}
    for name, data, expert in (("EP=2", 1, 2), ("DP=2", 2, 1))
    for stage in (0, 1, 2)
}


def run_pair(root: Path, layout: dict, fault: Fault | None = None, **outer) -> Path:
    a, b = (settings(name, i, 2, root / "rounds", **outer) for i, name in enumerate("ab"))
    a["parallel"] = layout
    first, second = Running(root / "a", a, fault=fault), Running(root / "b", b)
    if fault is not None:
        assert -signal.SIGKILL in first.ended(), first.error()
        first = Running(root / "a", a, attempt=2)
    finish(first, second)
    return root


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in events(run_dir, "train_step")]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ranks_of_a_replica_agree_with_each_other_and_with_the_other_replica(layout, tmp_path):
    run_pair(tmp_path, layout)
    found = hashes(tmp_path / "a")
    assert found == hashes(tmp_path / "b") and len(found) == STEPS // INNER_STEPS
    rounds = events(tmp_path / "a", "outer_round")
    assert all(each["counted"] == ["a", "b"] and not each["refused"] for each in rounds)
    # every rank's message is among the bytes
    assert all(each["wire_bytes_sent"] > 2000 for each in rounds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EP=2, ZeRO-1", "DP=2, ZeRO-0"])
def test_a_replica_of_two_ranks_is_killed_and_comes_back_to_the_same_bits(name, tmp_path):
    whole = run_pair(tmp_path / "whole", LAYOUTS[name])
    killed = run_pair(tmp_path / "killed", LAYOUTS[name], Fault(after_update=5))
    assert_same(whole / "a", killed / "a")
    assert_same(whole / "b", killed / "b")


DGC = {"rule": "dgc", "exchange": "collective", "inner_steps": 1, "clip_to_median": 0.0}


def run_dgc(root: Path, layout: dict, fault: Fault | None = None, port: int = 0) -> Path:
    """Two replicas that exchange every step's gradient; with a fault, b dies, a with it, and both
    are resumed."""
    configs = []
    for index, name in enumerate("ab"):
        meet = f"tcp://127.0.0.1:{port}" if port else root / "meet"
        config = settings(name, index, 2, meet, **DGC)
        config["parallel"] = layout
        config["optim"] = {"beta1": 0.0, "max_norm": 0.0}
        config["outer"] |= {"aggregation": "replicas", "dgc": {"density": 0.05}}
        configs.append(config)
    folders = [root / name for name in "ab"]
    faults = [None, fault]
    running = [Running(*each) for each in zip(folders, configs, (1, 1), faults, strict=True)]
    if fault is not None:
        assert [each.ended() for each in reversed(running)] == [[-signal.SIGKILL], [1]]
        running = [Running(*each) for each in zip(folders, configs, (2, 2), strict=True)]
    finish(*running)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUTS["EP=2, ZeRO-0"], {"data": 1, "expert": 1}])
def test_dgc_keeps_replicas_equal(layout, tmp_path):
    """Whoever steps with the mean of all gradients from the same weights has the same weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = run_dgc(tmp_path, {"zero_stage": 0} | layout, port=port)
    one, other = (events(root / name, "outer_round") for name in "ab")
    assert [each["round"] for each in one] == list(range(STEPS))
    assert all(each["counted"] == ["a", "b"] for each in one + other)
    norms = [[e["grad_norm"] for e in events(root / name, "train_step")] for name in "ab"]
    assert norms[0] == norms[1] and len(set(norms[0])) == STEPS
    assert losses(root / "a") != losses(root / "b")  # of its own tokens each
    one, other = (last_state(root / name) for name in "ab")
    masters = [key for key in one if key.startswith("master")]
    assert masters and all(torch.equal(one[key], other[key]) for key in masters)


@pytest.mark.slow
def test_dgc_goes_on_from_checkpoints_to_the_same_bits(tmp_path):
    layout = {"zero_stage": 0, "expert": 1}
    whole = run_dgc(tmp_path / "whole", layout)
    killed = run_dgc(tmp_path / "killed", layout, Fault(after_update=5))
    for name in "ab":
        assert_same(whole / name, killed / name)


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("parallel", "zero_stage", 1),
        ("optim", "beta1", 0.9),
        ("optim", "non_finite", "skip"),
    ],
)
def test_what_dgc_cannot_have_is_refused_in_one_sentence(section, field, value, tmp_path):
    config = settings("a", 0, 2, tmp_path, **DGC)
    config["optim"] = {"beta1": 0.0}
    build_config(TrainConfig, config, "train")
    config[section][field] = value
    with pytest.raises(ValueError, match=f"{section}.{field} is {value} with outer.rule dgc"):
        build_config(TrainConfig, config, "train")


def test_replicas_end_a_phase_at_the_same_step(tmp_path):
    config = settings("a", 0, 2, tmp_path)
    config["phases"][0]["until_exact_match"] = 0.5
    config["task"], config["data"]["task_share"] = {"size": 900, "min_heldout": 10}, 0.5
    with pytest.raises(ValueError, match="until_exact_match is 0.5 with outer; expected null"):
        build_config(TrainConfig, config, "train")
