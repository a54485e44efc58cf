"""Replicas under one plan: the same masks on all, of any topology, whenever they came."""

import json
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from gossamer.launch.recipe import build_config
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from outer_runs import STEPS, Fault, Running, finish, hashes, settings
from sparse_rules import GMP, RIGL, SR_STE
from tiny_run import events

SLOW_RULE = pytest.param("sparseloco", marks=pytest.mark.slow)
PLAN = {"rules": [RIGL, SR_STE, GMP], "total_steps": STEPS}


def sparse(replica: str, index: int, rounds: Path, rule: str, ranks: int = 1) -> dict:
    found = settings(replica, index, 2, rounds, rule=rule)
    return found | {"sparsity": PLAN, "parallel": {"expert": ranks, "zero_stage": int(ranks > 1)}}


def last(folder: Path) -> Checkpoint:
    return Checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def changes(folder: Path) -> dict[int, tuple]:
    """What the shared masks' changes were told to be, by step."""
    return {
        e["step"]: (e["mask_version"], e["density"], e["layer_density"])
        for e in events(folder, "masks")
        if not e["step"] % 2
    }


@pytest.fixture(scope="module", params=["diloco", SLOW_RULE])
def fleet(tmp_path_factory, request) -> dict[str, Path]:
    """a is killed between two rounds and goes on; b has two ranks; c comes in the middle."""
    root = tmp_path_factory.mktemp(request.param)
    folders = {name: root / name for name in "abc"}
    a, b, c = (
        sparse(name, i % 2, root / "rounds", request.param, ranks)
        for i, (name, ranks) in enumerate([("a", 1), ("b", 2), ("c", 1)])
    )
    killed = Running(folders["a"], a, fault=Fault(after_update=5))
    other = Running(folders["b"], b)
    assert killed.ended() == [-SIGKILL], killed.error()
    finish(Running(folders["c"], c), Running(folders["a"], a, attempt=2), other)
    return folders | {"rounds": root / "rounds"}


def test_all_replicas_hold_the_same_masks_at_the_plans_density(fleet):
    a, b, c = (fleet[name] for name in "abc")
    assert events(c, "outer_start")[0]["source"] == "anchor"
    told, known = hashes(b), changes(b)
    assert known.keys() == {0, 2, 4, 6, 8} and len(told) == 4
    for folder in (a, c):
        assert hashes(folder).items() <= told.items()
        for step, change in changes(folder).items():
            assert step == 0 or change == known[step], step
    ends = [last(folder) for folder in (a, b, c)]
    assert [end.step for end in ends] == [STEPS] * 3
    for name, shape in ends[0].shapes.items():
        one, *others = (end.read(name, 0, shape[0]) for end in ends)
        for other in others:
            assert torch.equal(one.master, other.master), name
            if ends[0].has(name, "mask"):
                assert torch.equal(one.moments["mask"], other.moments["mask"]), name
    targets = {"q_proj": 0.2, "gate_proj": 0.3, "up_proj": 0.3}
    for part, density in targets.items():
        masks = [
            ends[0].rows(name, 0, shape[0], "mask")
            for name, shape in ends[0].shapes.items()
            if part in name
        ]
        kept = sum(int(mask.sum()) for mask in masks)
        assert abs(kept - density * sum(mask.numel() for mask in masks)) <= len(masks)


def test_the_record_of_a_round_names_the_version_of_its_masks(fleet):
    records = [json.loads(p.read_text()) for p in sorted(fleet["rounds"].glob("round-*.json"))]
    assert [each["mask_version"] for each in records] == list(range(len(records)))
    assert len({each["base_hash"] for each in records}) == len(records)


def test_one_that_comes_after_the_last_round_has_its_weights_and_masks(fleet, tmp_path):
    """Masks have changed since its own first ones, and what grew has learned since."""
    rule = fleet["rounds"].parent.name.rstrip("0123456789")
    finish(Running(tmp_path, sparse("d", 0, fleet["rounds"], rule)))
    (start,) = events(tmp_path, "outer_start")
    assert start["source"] == "anchor" and not events(tmp_path, "outer_round")
    mine, theirs = last(tmp_path), last(fleet["b"])
    for name, shape in theirs.shapes.items():
        for kind in ("master", "mask"):
            if theirs.has(name, kind):
                rows = [end.rows(name, 0, shape[0], kind) for end in (mine, theirs)]
                assert torch.equal(*rows), (name, kind)


def test_nothing_lives_off_the_mask(fleet):
    for checkpoint in map(last, (fleet["a"], fleet["b"])):
        buffers = {kind for kind, _ in checkpoint.kinds() if kind.startswith("outer")}
        assert len(buffers) >= 2
        for name, shape in checkpoint.shapes.items():
            if not checkpoint.has(name, "mask") or "down_proj" in name:
                continue
            off = ~checkpoint.rows(name, 0, shape[0], "mask")
            for kind in ("master", "exp_avg", "exp_avg_sq", *buffers):
                if checkpoint.has(name, kind):
                    assert not checkpoint.rows(name, 0, shape[0], kind)[off].any(), (name, kind)


def test_what_is_sent_whole_is_what_is_kept(fleet, request):
    if "sparseloco" in str(fleet["rounds"]):
        pytest.skip("two bits an element: tests/trainer/test_sparsity_kept.py")
    checkpoint, sent = last(fleet["b"]), 0
    for name, shape in checkpoint.shapes.items():
        is_shared = checkpoint.has(name, "mask") and "down_proj" not in name
        size = torch.Size(shape).numel()
        sent += int(checkpoint.rows(name, 0, shape[0], "mask").sum()) if is_shared else size
        sent += size if is_shared and "q_proj" not in name else 0  # dense gradients, to grow by
    number = 3  # its masks are those of the end but for a few of q_proj
    files = list((fleet["rounds"] / f"rounds/{number:08d}").glob("b-*.message"))
    found = sum(file.stat().st_size for file in files)
    assert len(files) == 2 and found < 1.15 * 4 * sent


@pytest.mark.slow
def test_killed_between_rounds_it_goes_on_with_the_same_bits(tmp_path):
    """Error buffers among them, over changes of masks; two ranks, so rows are cut."""
    folders, ends = [tmp_path / "whole", tmp_path / "killed"], []
    for folder in folders:
        config = sparse("a", 0, folder / "rounds", "sparseloco", ranks=2)
        config["outer"]["expected_replicas"] = 1
        if folder.name == "killed":
            first = Running(folder, config, fault=Fault(after_update=5))
            assert -SIGKILL in first.ended(), first.error()
        finish(Running(folder, config, attempt=2))
        ends.append(last(folder))
    assert hashes(folders[1]) == hashes(folders[0])
    whole, killed = ends
    for name, shape in whole.shapes.items():
        one, other = (end.read(name, 0, shape[0]) for end in ends)
        assert torch.equal(one.master, other.master), name
        for kind in (each for each, owner in whole.kinds() if owner == name):
            rows = [end.rows(name, 0, shape[0], kind) for end in (whole, killed)]
            assert torch.equal(*rows), (name, kind)


def test_masks_that_replicas_cannot_agree_on_are_refused(tmp_path):
    good = sparse("a", 0, tmp_path, "diloco")
    every_3 = {"density": 0.3, "every_steps": 3}
    for change, message in (
        ({"schedule": every_3}, "expected multiples of outer.inner_steps=2"),
        ({"schedule": every_3, "flow": {"kind": "ste"}}, "expected a divisor"),
        ({"schedule": {"every_steps": 2, "unit": "tokens"}}, "expected steps or compute"),
        (
            {"schedule": {"every_steps": 1}, "flow": {"kind": "ste"}, "end": {"kind": "prune"}},
            "end.kind is prune",
        ),
        ({"schedule": {"every_steps": 2}, "criterion": "momentum"}, "uses the momentum"),
    ):
        plan = {"rules": [{"match": ["*.q_proj.weight"]} | change], "total_tokens": 1000}
        with pytest.raises(ValueError, match=message):
            build_config(TrainConfig, good | {"sparsity": plan}, "train")
    with pytest.raises(ValueError, match="outer.rule is dgc with sparsity"):
        dgc = {
            "optim": {"beta1": 0.0},
            "outer": good["outer"] | {"rule": "dgc", "inner_steps": 1} | {"exchange": "collective"},
        }
        build_config(TrainConfig, good | dgc, "train")
