"""Replicas that are killed anywhere and resumed end as if nothing had been, to the bit."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from outer_runs import STEPS, Fault, Running, finish, hashes, records, settings
from tiny_run import events

NAMES = "ab"
# rounds are at steps 2, 4, 6, 8; checkpoints at 3, 6 and at the end
FAULTS = {
    "in inner steps": Fault(after_update=5),
    "before its message": Fault(r"rounds/00000002/b-.*"),
    "after its message": Fault(r"rounds/00000002/b-.*", "after"),
    "before it applies a round": Fault(after_settle=1),
}

ALONE = FAULTS | {
    "before a record": Fault(r"round-00000001.json"),
    "after a record": Fault(r"round-00000001.json", "after"),
    "within an anchor": Fault(r"anchors/00000002/.*", "after"),
}


def last_state(run_dir: Path) -> dict:
    """Everything in the last checkpoint, by kind and name."""
    checkpoint = Checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    assert checkpoint.step == STEPS
    found = {
        f"{kind} {name}": checkpoint.rows(name, 0, checkpoint.shapes[name][0], kind)
        for kind, name in checkpoint.kinds()
    }
    return found | {"outer": checkpoint.state["outer"], "data": checkpoint.state["data"]}


def assert_same(one: Path, other: Path) -> None:
    expected, found = last_state(one), last_state(other)
    assert found.keys() == expected.keys()
    assert any(key.startswith("outer_own") for key in found)
    for key, value in expected.items():
        same = torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else None
        assert same if same is not None else value == found[key], key


def run_pair(root: Path, fault: Fault | None = None) -> Path:
    """Two replicas; with a fault, b is killed and resumed."""
    settings_of = {
        name: settings(name, index, 2, root / "rounds") for index, name in enumerate(NAMES)
    }
    a = Running(root / "a", settings_of["a"])
    b = Running(root / "b", settings_of["b"], fault=fault)
    if fault is not None:
        assert b.ended() == [-signal.SIGKILL], b.error()
        b = Running(root / "b", settings_of["b"], attempt=2)
    finish(a, b)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run_pair(tmp_path_factory.mktemp("whole"))


def check_pair(whole: Path, root: Path) -> None:
    for name in NAMES:
        assert_same(whole / name, root / name)
    found = hashes(root / "a")
    assert found == hashes(root / "b") == hashes(whole / "a") and len(found) == STEPS // 2
    # the books are those of the run that was never killed
    for mine, theirs in zip(records(root / "rounds"), records(whole / "rounds"), strict=True):
        assert mine["books"] == theirs["books"] and not mine["refused"]


def test_one_of_two_is_killed_after_its_message_and_comes_back(whole, tmp_path):
    check_pair(whole, run_pair(tmp_path, FAULTS["after its message"]))
    start = events(tmp_path / "b", "outer_start")[-1]
    assert (start["source"], start["incarnation"], start["round"]) == ("checkpoint", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("point", sorted(FAULTS.keys() - {"after its message"}))
def test_one_of_two_is_killed_anywhere(whole, tmp_path, point):
    check_pair(whole, run_pair(tmp_path, FAULTS[point]))


@pytest.mark.slow
@pytest.mark.parametrize("point", sorted(ALONE))
def test_one_alone_is_killed_anywhere(tmp_path, point):
    fault = replace(ALONE[point], pattern=ALONE[point].pattern.replace("/b-", "/a-"))
    config = settings("a", 0, 1, tmp_path / "rounds")
    undisturbed = settings("a", 0, 1, tmp_path / "undisturbed")
    finish(Running(tmp_path / "whole", undisturbed))
    killed = Running(tmp_path / "killed", config, fault=fault)
    assert killed.ended() == [-signal.SIGKILL], killed.error()
    finish(Running(tmp_path / "killed", config, attempt=2))
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "killed")


@pytest.mark.slow
def test_without_a_checkpoint_it_takes_the_anchor_and_the_tokens_that_follow(tmp_path):
    """What counted is not trained again: the next loss is that of a run that was never killed."""

    def config(folder: str) -> dict:
        found = settings("a", 0, 1, tmp_path / folder, inner_steps=1, anchor_every_rounds=100)
        found["checkpoint"]["every_steps"] = 100
        return found

    finish(Running(tmp_path / "whole", config("rounds")))
    killed = Running(tmp_path / "killed", config("again"), fault=Fault(after_settle=2))
    assert killed.ended() == [-signal.SIGKILL]
    finish(Running(tmp_path / "killed", config("again"), attempt=2))
    (start,) = events(tmp_path / "killed", "outer_start")[1:]
    assert (start["source"], start["round"], start["missed"]) == ("anchor", 3, 3)
    losses = [
        {e["step"]: (e["loss"], e["tokens"]) for e in events(tmp_path / name, "train_step")}
        for name in ("whole", "killed")
    ]
    del losses[0][3]  # it was killed before it could tell
    assert losses[0].keys() == losses[1].keys()
    assert losses[0][4] == losses[1][4]  # from then on inner moments are others
    assert [each[1] for each in losses[0].values()] == [each[1] for each in losses[1].values()]
