"""RL with its options on: killed and resumed it is the same run; what it says of changes is so;
samples are as stale as they may be and no staler."""

from pathlib import Path

import local_rollouts
import pytest
from gloo_world import run_world
from gossamer.comm.rollout import Request, Sample
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from local_rollouts import LocalRollouts
from test_resume import run_until
from tiny_run import SETTINGS, events

RL = {
    **SETTINGS["rl"],
    "baseline": "leave_one_out",
    "loss_mean": "fixed",
    "refill_rounds": 1,
    "kl_coef": 0.1,
}
OPTIONS = {**SETTINGS, "rl": RL, "metrics": {"wandb_mode": "disabled", "changes_every_steps": 1}}
SAME = ("loss", "kl", "grad_norm", "learned_tokens", "reward_mean", "groups_learned", "refills")


class EagerRollouts(LocalRollouts):
    """Samples a batch when it is asked for, so that it is as old as the config allows."""

    def submit(self, batch: str, units: list[list[Request]], oldest_version: int) -> None:
        super().submit(batch, units, oldest_version)
        self._sampled = getattr(self, "_sampled", {}) | {batch: super().collect(batch)}

    def collect(self, batch: str) -> list[Sample]:
        return self._sampled.pop(batch)


def run_eagerly(run_dir: str, settings: dict) -> dict:
    local_rollouts.LocalRollouts = EagerRollouts
    return run_until(run_dir, None, settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    config = build_config(TrainConfig, OPTIONS, "train")
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    for folder in (whole, killed):
        prepare_run(config, folder, "test")
    run_world(run_until, 2, str(whole), None, OPTIONS)
    with pytest.raises(AssertionError, match="exit code -9"):
        run_world(run_until, 2, str(killed), 9, OPTIONS)
    run_world(run_until, 2, str(killed), None, OPTIONS)
    return whole, killed


def steps_of(folder: Path) -> dict[int, dict]:
    """By step; of a step that was done again the later one."""
    return {e["step"]: {name: e.get(name) for name in SAME} for e in events(folder, "train_step")}


@pytest.mark.slow
def test_a_resumed_run_reads_its_reference_again(runs):
    whole, killed = runs
    assert steps_of(whole) == steps_of(killed)
    (first, *_, last) = (e["kl"] for e in events(whole, "train_step") if e["phase"] == "rl")
    assert 0 < first < 1e-3 < last  # rounded at first, then somewhere else
    assert all(e["equal"] for folder in runs for e in events(folder, "audit"))


@pytest.mark.slow
def test_what_changed_is_what_was_published(runs):
    whole, killed = runs
    changed = {e["step"]: e for e in events(whole, "change")}
    published = [e for e in events(whole, "publish") if e["kind"] == "delta"]
    assert len(published) == 5
    for version in published:
        told = changed[version["step"]]
        assert told["changed_share"] == version["density"] and told["since_step"] == 6
        assert told["changed"] and max(told["kept"]) <= max(told["seen"]) <= max(told["changed"])
    # masks begin anew with the attempt, at the checkpoint it went on from
    assert events(killed, "change")[-1]["since_step"] == 8


@pytest.mark.slow
def test_no_sample_is_staler_than_allowed(tmp_path):
    rl = {**SETTINGS["rl"], "max_staleness": 2, "decoupled": True, "importance_cap": 2.0}
    settings = {**SETTINGS, "rl": rl}
    prepare_run(build_config(TrainConfig, settings, "train"), tmp_path, "test")
    run_world(run_eagerly, 2, str(tmp_path), settings)
    steps = [e for e in events(tmp_path, "train_step") if e["phase"] == "rl"]
    assert [e["staleness_max"] for e in steps] == [e["staleness_mean"] for e in steps]
    assert [e["staleness_max"] for e in steps] == [0, 1, 2, 2, 2]
    assert abs(steps[0]["mean_ratio"] - 1) < 0.01 < max(e["clip_share"] for e in steps[2:])
    assert all(e["equal"] for e in events(tmp_path, "audit"))
