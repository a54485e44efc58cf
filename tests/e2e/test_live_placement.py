"""A run whose experts move, is killed and resumed elsewhere, is the run in which they stayed."""

import pytest
import torch
from gloo_world import run_world
from gossamer.comm.log import WeightLog
from gossamer.launch.recipe import build_config
from gossamer.parallel.placement.placement import from_ranks, save_placement
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from test_resume import run_until
from tiny_run import SETTINGS, events


def settings_with(placement: dict) -> dict:
    return {
        **SETTINGS,
        "phases": [
            {"name": "text", "kind": "next_token", "max_steps": 5, "lr": 0.01},
            {"name": "rl", "kind": "grpo", "max_steps": 4, "lr": 0.01},
        ],
        "parallel": {"expert": 2, "zero_stage": 1, "placement": placement},
        "metrics": {"wandb_mode": "disabled", "expert_load_every_steps": 1},
    }


def run_on_fast_links(run_dir: str, kill_at_step: int | None, settings: dict) -> dict:
    """As run_until, on a machine on which whatever saves a token pays."""
    from gossamer.parallel.placement.worth import Speed
    from gossamer.trainer.replacement import LivePlacement

    LivePlacement._measure = lambda self, pairs: Speed(pair_s=1.0, bytes_per_s=1e12)
    return run_until(run_dir, kill_at_step, settings)


@pytest.mark.slow
def test_moves_kills_and_another_placement_change_no_bit(tmp_path):
    file = tmp_path / "placement.json"
    save_placement(from_ranks([[1, 0, 1, 0], [0, 1, 1, 0]], 2), file)
    still, moved = tmp_path / "still", tmp_path / "moved"
    settings = settings_with({"path": str(file), "every_steps": 2})
    for folder in (still, moved):
        prepare_run(build_config(TrainConfig, settings, "train"), folder, "test")
    run_world(run_until, 2, str(still), None, settings_with({}))
    # saved where live placement had put the experts, resumed where the file has them
    with pytest.raises(AssertionError, match="exit code -9"):
        run_world(run_on_fast_links, 2, str(moved), 5, settings)
    run_world(run_on_fast_links, 2, str(moved), None, settings)

    decisions = events(moved, "placement")
    assert [d["step"] for d in decisions if d["reason"] == "live"] == [2, 4, 6, 8]
    assert len([d for d in decisions if d["reason"] == "file"]) == 2
    live = [d for d in decisions if d["reason"] == "live" and d["is_moved"]]
    assert live
    for decision in live:
        assert decision["bytes"] > 0 and decision["moved_experts"] > 0
        assert decision["max_over_mean_after"] < decision["max_over_mean"]

    numbers = {e["step"]: (e["loss"], e["grad_norm"], e["expert_load"])
               for e in events(still, "train_step")}  # fmt: skip
    assert len(numbers) == 9
    for event in events(moved, "train_step"):
        found = event["loss"], event["grad_norm"], event["expert_load"]
        assert found == numbers[event["step"]], event["step"]
    ends = [Checkpoint(list_checkpoints(f / "checkpoints")[-1]) for f in (still, moved)]
    for name, shape in ends[0].shapes.items():
        one, other = (end.read(name, 0, shape[0]) for end in ends)
        assert torch.equal(one.master, other.master), name
        for kind, values in one.moments.items():
            assert torch.equal(other.moments[kind], values), (name, kind)

    logs = [WeightLog.open(folder / "log") for folder in (still, moved)]
    hashes = [log.manifest(log.head()).state_hash for log in logs]
    assert hashes[0] == hashes[1]
    for folder in (still, moved):
        audits = events(folder, "audit")
        assert len(audits) == 2 and all(audit["equal"] for audit in audits)
    after_moves = [d["step"] for d in live if d["step"] > 5]
    kinds = {e["step"]: e["kind"] for e in events(moved, "publish")}
    assert after_moves and all(kinds[step] == "anchor" for step in after_moves)
