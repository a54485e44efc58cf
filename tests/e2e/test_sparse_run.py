"""Runs with a sparsity plan: zeros where they belong, resumed in a window, exported plainly."""

import copy
from pathlib import Path

import pytest
import torch
from gloo_world import run_world
from gossamer.comm.names import logical_views
from gossamer.launch.config import RunConfig
from gossamer.launch.export import export_run
from gossamer.launch.mask_charts import mask_chart
from gossamer.launch.recipe import build_config
from gossamer.launch.report import write_report
from gossamer.launch.summary import read_events, settle
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from gossamer.trainer.sparsity.bits import unpack_rows
from safetensors import safe_open
from sparse_rules import GMP, RIGL, SR_STE
from tiny_run import SETTINGS, events
from transformers import AutoModelForCausalLM

STEPS, IN_A_WINDOW = 7, 3
CHANGED_AT = [0, 1, 2, 3, 4, 5, 6, 7]


def settings(**parallel: int) -> dict:
    plan = {"rules": [RIGL, SR_STE, GMP]}
    phase = {"name": "pretrain", "kind": "next_token", "max_steps": STEPS, "lr": 0.01}
    found = copy.deepcopy(SETTINGS) | {"phases": [phase], "sparsity": plan}
    found["parallel"] = parallel or found["parallel"]
    found["checkpoint"]["every_steps"] = 1
    return found


def run(run_dir: str, settings: dict, resume_from: str | None) -> None:
    from gossamer.trainer.loop import train
    from gossamer.trainer.session import RunPlace, Session

    config = build_config(TrainConfig, settings, "train")
    place = RunPlace(run_dir=Path(run_dir), name="test", resume_from=resume_from)
    train(Session(config, place, None, on_checkpoint=lambda step: None))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    prepare_run(build_config(TrainConfig, settings(), "train"), folder, "test")
    run_world(run, 2, str(folder), settings(), None)
    return folder


def checkpoints(folder: Path) -> dict[int, Checkpoint]:
    return {c.step: c for c in map(Checkpoint, list_checkpoints(folder / "checkpoints"))}


def test_masked_weights_and_moments_are_zero_and_n_of_m_holds(whole):
    changes = events(whole, "masks")
    assert [e["step"] for e in changes] == CHANGED_AT
    assert [e["mask_version"] for e in changes] == CHANGED_AT
    for step, checkpoint in checkpoints(whole).items():
        kept = size = 0
        for name, shape in checkpoint.shapes.items():
            if not checkpoint.has(name, "mask"):
                continue
            rows = checkpoint.read(name, 0, shape[0])
            mask = rows.moments["mask"]
            kept, size = kept + int(mask.sum()), size + mask.numel()
            if "down_proj" in name:
                assert (mask.view(-1, 4).sum(1) == 2).all()
                assert rows.master[~mask].all()  # they live on
                continue
            for values in (rows.master, rows.moments["exp_avg"], rows.moments["exp_avg_sq"]):
                assert not values[~mask].any(), (step, name)
        told = [e for e in changes if e["step"] <= step][-1]
        assert told["density"] == kept / size
        assert [len(layer) for layer in told["expert_target"]] == [4, 4]
        experts = zip(sum(told["expert_density"], []), sum(told["expert_target"], []), strict=True)
        assert all(density == pytest.approx(target, abs=0.01) for density, target in experts)
    q_proj = checkpoint.rows("model.layers.0.self_attn.q_proj.weight", 0, 32, "mask")
    assert int(q_proj.sum()) == round(0.2 * q_proj.numel())
    last = events(whole, "train_step")[-1]
    assert last["sparse_flops"] < last["flops"] and last["mean_density"] > last["mask_density"]


def test_resumed_in_the_middle_of_a_window_it_is_the_same_run(whole, tmp_path):
    start = checkpoints(whole)[IN_A_WINDOW]
    assert start.has("model.layers.0.mlp.experts.0.up_proj.weight", "window")
    prepare_run(build_config(TrainConfig, settings(), "train"), tmp_path, "test")
    run_world(run, 2, str(tmp_path), settings(), start.url)
    ends = [checkpoints(folder)[STEPS] for folder in (whole, tmp_path)]
    for name, shape in ends[0].shapes.items():
        one, other = (end.read(name, 0, shape[0]) for end in ends)
        assert torch.equal(one.master, other.master), name
        assert one.moments.keys() == other.moments.keys()
        for kind, values in one.moments.items():
            assert torch.equal(values, other.moments[kind]), (name, kind)
    for event in ("masks", "train_step"):
        pairs = [
            {e["step"]: e for e in events(folder, event) if e["step"] > IN_A_WINDOW}
            for folder in (whole, tmp_path)
        ]
        assert pairs[0].keys() == pairs[1].keys()
        for step, found in pairs[1].items():
            timed = {k for k in found if k.endswith("_s") or k == "mfu"}
            assert {k: v for k, v in found.items() if k not in timed} == {
                k: v for k, v in pairs[0][step].items() if k not in timed
            }


@pytest.mark.slow
def test_another_topology_takes_up_masks_and_window(whole, tmp_path):
    start, other = checkpoints(whole)[IN_A_WINDOW], settings(data=2, expert=1, zero_stage=2)
    prepare_run(build_config(TrainConfig, other, "train"), tmp_path, "test")
    run_world(run, 2, str(tmp_path), other, start.url)
    for event in ("masks", "train_step"):
        found = {e["step"]: e for e in events(tmp_path, event) if e["step"] > IN_A_WINDOW}
        for step, one in found.items():
            two = next(e for e in events(whole, event) if e["step"] == step)
            if event == "masks":
                assert one["density"] == two["density"]
                assert one["mask_hash"] == two["mask_hash"], step
            else:
                assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_the_report_draws_densities_and_flips(whole):
    path = write_report(whole)
    assert "Sparsity plan" in path.read_text()
    chart = mask_chart(settle(read_events(whole)))
    target, density, mean, flips, dead, heat = chart.figure.data
    assert list(target.x) == CHANGED_AT and list(density.x) == list(range(1, STEPS + 1))
    last = events(whole, "masks")[-1]
    assert target.y[-1] == 100 * last["target"] and flips.y[-1] == 100 * last["flip_rate"]
    assert mean.y[-1] == 100 * events(whole, "train_step")[-1]["mean_density"]
    assert len(dead.y) == len(CHANGED_AT) and len(heat.z) == 2 and len(heat.z[0]) == 4


def test_export_is_plain_weights_with_zeros_and_masks_lie_beside(whole):
    config = build_config(RunConfig, {"name": "test", "train": settings()}, "")
    out = export_run(config, whole, whole / "out")
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["model.safetensors"]
    assert "sparsity" not in (out / "config.json").read_text()
    model, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    checkpoint = checkpoints(whole)[STEPS]
    weights = logical_views(model.named_parameters())
    with safe_open(out / "sparsity/masks.safetensors", "pt") as file:
        names = set(file.keys())
        assert names == {n for n in checkpoint.shapes if checkpoint.has(n, "mask")}
        for name in names:
            mask = unpack_rows(file.get_tensor(name), tuple(weights[name].shape))
            assert file.metadata()[name] == str(mask.shape[1])
            assert torch.equal(mask, checkpoint.rows(name, 0, len(mask), "mask"))
            assert not weights[name][~mask].any()
            master = checkpoint.rows(name, 0, len(mask))
            assert torch.equal(weights[name][mask], master[mask].to(weights[name].dtype))
