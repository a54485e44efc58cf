"""A NaN on one rank is skipped by all; deterministic runs repeat; profiler and MFU work."""

import json
from pathlib import Path

import pytest
import torch
from gloo_world import run_world
from gossamer.launch.recipe import build_config
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from tiny_run import SETTINGS, events

PHASE = {
    "name": "pretrain",
    "kind": "next_token",
    "max_steps": 4,
    "lr": 0.01,
    "schedule": "linear",
    "final_lr_share": 0.1,
}
STEP_SETTINGS = {
    **{k: v for k, v in SETTINGS.items() if k not in ("task", "rl")},
    "model": {**SETTINGS["model"], "router": "sigmoid_bias", "recompute": "moe"},
    "data": {**SETTINGS["data"], "task_share": 0.0},
    "phases": [PHASE],
    "micro_rows": 2,
    "deterministic": True,
    "optim": {"non_finite": "skip", "max_skips": 1},
    "metrics": {"wandb_mode": "disabled", "profile_steps": [2, 3]},
    "checkpoint": {"every_steps": 1, "keep_last": 20},
}
HELDOUT_EVERY = {"again": 2}
"""Steps between looks at held-out text, 100 where not named: the same documents are held out."""
RUNS = {"plain": [], "again": [], "one": [3], "two": [1, 2]}
"""Steps in which the loss of rank 1 is NaN, by run."""


def run_all(folder: str) -> dict[str, str]:
    """What ended each run, or nothing."""
    import gossamer.trainer.update as steps
    from gossamer.trainer.loop import train
    from gossamer.trainer.session import RunPlace, Session

    ended, loss_sum = {}, steps.next_token_loss_sum
    for name, nan_steps in RUNS.items():
        heldout = {"every_steps": HELDOUT_EVERY.get(name, 100), "num_rows": 5, "permille": 300}
        config = build_config(TrainConfig, {**STEP_SETTINGS, "heldout": heldout}, "train")
        place = RunPlace(run_dir=Path(folder, name), name="test")
        session = Session(config, place, None, on_checkpoint=lambda step: None)

        def poisoned(logits, batch, session=session, nan_steps=nan_steps):
            is_nan = session.dims.rank == 1 and session.progress.step + 1 in nan_steps
            return loss_sum(logits, batch) * (float("nan") if is_nan else 1.0)

        steps.next_token_loss_sum = poisoned
        try:
            train(session)
            ended[name] = ""
        except FloatingPointError as error:
            ended[name] = str(error)
    assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
    return ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("runs")
    for name in RUNS:
        prepare_run(build_config(TrainConfig, STEP_SETTINGS, "train"), folder / name, "test")
    return folder, run_world(run_all, 2, str(folder))


def column(run: Path, field: str) -> list:
    return [event[field] for event in events(run, "train_step")]


def different(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Tensors whose master or moments differ in a bit."""
    assert one.shapes == other.shapes
    found = []
    for name, shape in one.shapes.items():
        rows = [checkpoint.read(name, 0, shape[0]) for checkpoint in (one, other)]
        pairs = [{"master": r.master, **r.moments} for r in rows]
        found += [name for k in pairs[0] if not torch.equal(pairs[0][k], pairs[1][k])]
    return found


def test_all_ranks_skip_a_nan_of_one_and_nothing_moves(runs):
    folder, _ = runs
    rates = column(folder / "plain", "lr")
    assert column(folder / "one", "skipped") == [False, False, True, False]
    assert column(folder / "one", "skips") == [0, 0, 1, 1]
    assert column(folder / "one", "lr") == [*rates[:3], rates[2]]
    assert column(folder / "one", "loss")[:2] == column(folder / "plain", "loss")[:2]
    saved = [Checkpoint(path) for path in list_checkpoints(folder / "one" / "checkpoints")]
    by_step = {checkpoint.step: checkpoint for checkpoint in saved}
    assert any("e_score_correction_bias" in name for name in by_step[3].shapes)
    assert different(by_step[2], by_step[3]) == []
    assert different(by_step[3], by_step[4]) != []
    assert [by_step[step].state["num_updates"] for step in (2, 3, 4)] == [2, 2, 3]
    assert by_step[3].state["progress"]["phase_skips"] == 1


def test_too_many_skips_in_a_row_end_the_run_on_every_rank(runs):
    folder, ended = runs
    assert ended[0] == ended[1]
    assert "optim.max_skips=1" in ended[0]["two"] and "step 2" in ended[0]["two"]
    assert [ended[0][name] for name in ("plain", "again", "one")] == ["", "", ""]


def test_two_deterministic_runs_are_the_same_bits_however_often_they_are_evaluated(runs):
    folder, _ = runs
    assert [e["step"] for e in events(folder / "again", "eval")] == [2, 4]
    assert events(folder / "plain", "eval") == []
    for evaluated in events(folder / "again", "eval"):
        assert 3.0 < evaluated["loss"] < 7.0 and evaluated["tokens"] > 100
    for field in ("loss", "grad_norm", "balance_loss", "expert_load"):
        found = [
            [e.get(field) for e in events(folder / n, "train_step")] for n in ("plain", "again")
        ]
        assert found[0] == found[1]
    ends = [
        Checkpoint(list_checkpoints(folder / n / "checkpoints")[-1]) for n in ("plain", "again")
    ]
    assert different(*ends) == []


def test_the_profiler_watched_two_steps_on_every_rank(runs):
    folder, _ = runs
    for rank in range(2):
        trace = json.loads((folder / "plain" / "profile" / f"rank{rank}.json").read_text())
        steps = [e for e in trace["traceEvents"] if e.get("name") == "Optimizer.step#AdamW.step"]
        assert len(steps) == 2 * 3  # groups: experts, what decays, what does not


def test_mfu_is_flops_over_time_and_peak(runs):
    folder, _ = runs
    (start,) = events(folder / "plain", "run_start")
    assert start["peak_source"] == "measured" and start["peak_flops"] > 1e8
    for event in events(folder / "plain", "train_step"):
        expected = event["flops"] / event["step_s"] / start["peak_flops"]
        assert event["mfu"] == pytest.approx(expected) and 0 < event["mfu"] < 1
