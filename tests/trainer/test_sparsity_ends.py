"""Recipes of the literature run to their ends on a real engine: final densities to the bit."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_world import run_world
from gossamer.launch.recipe import build_config
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from gossamer.trainer.sparsity.export import SparseCheckpoint
from gossamer.trainer.sparsity.recipes import RECIPES
from tiny_run import SETTINGS, events

STE_DENSIFIED: dict = {
    "pattern": {"kind": "n_m", "n": 1, "m": 4},
    "schedule": {"every_steps": 1},
    "flow": {"kind": "ste"},
    "end": {"kind": "densify", "at": 0.5},
}
GRADIENT: dict = {
    "match": ["*.self_attn.*_proj.weight"],
    "schedule": {"density": 0.25, "every_steps": 2},
    "regrow": {"criterion": "gradient", "share": 0.5, "stop": 1.0},
}
SOON: dict[str, dict] = {
    "cast": {"every_steps": 2},
    "pgf_mask": {"every_steps": 1, "stop": 0.75},
    "acdc": {
        "every_steps": 2,
        "period_steps": 2,
        "start": 0.25,
        "stop": 0.75,
        "density": 0.25,
    },
}
"""Schedules of recipes for runs of a few steps."""


def settings(steps: int, *rules: dict) -> dict:
    phase = {"name": "pretrain", "kind": "next_token", "max_steps": steps, "lr": 0.01}
    found = copy.deepcopy(SETTINGS) | {"phases": [phase], "sparsity": {"rules": list(rules)}}
    found["parallel"] = {"expert": 1, "zero_stage": 0}
    found["data"]["task_share"], found["task"] = 0.0, None
    found["checkpoint"]["every_steps"] = 100
    return found


def recipe(name: str) -> dict:
    (rule,) = json.loads(json.dumps(asdict(RECIPES[name])))["rules"]
    return rule | {"schedule": rule["schedule"] | SOON[name]}


class Run:
    """One rank of one run, taken step by step."""

    def __init__(
        self, folder: Path, name: str, config: dict, resume_from: str | None = None
    ) -> None:
        from gossamer.trainer.session import RunPlace, Session

        self.folder = folder / name
        if resume_from is None:
            shutil.copytree(folder / "prepared", self.folder)
        built = build_config(TrainConfig, config, "train")
        place = RunPlace(run_dir=self.folder, name="test", resume_from=resume_from)
        self.session = Session(built, place, None, on_checkpoint=lambda step: None)
        self.session.start()
        self.phase = self.session.phase()

    def rows(self) -> dict[str, dict[str, torch.Tensor]]:
        """Masters, masks and moments of all governed matrices, and what the forward pass sees."""
        engine, found = self.session.engine, {}
        for each in engine.owned(with_moments=True):
            if "mask" in each.moments:
                kinds = {"master": each.master, **each.moments}
                found[each.name] = {kind: values.clone() for kind, values in kinds.items()}
        for each in engine.owned(with_moments=False):
            if each.name in found:
                seen = each.master if each.weight is None else each.weight
                found[each.name]["seen"] = seen.clone()
        return found

    def steps(self, count: int) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the rows as they were after the last update and before masks changed."""
        for _ in range(count):
            result = self.session.update(self.phase)
            rows = self.rows()
            self.session.sync_replicas(self.phase)
            self.session.record(self.phase, result)
        return rows

    def spoil_the_next_gradient(self) -> None:
        engine, backward = self.session.engine, self.session.engine.backward

        def spoilt(loss: torch.Tensor, is_last: bool) -> None:
            engine.backward = backward
            backward(loss * math.nan, is_last)

        engine.backward = spoilt

    def told(self, event: str, key: str) -> list:
        self.session._events.flush()
        return [each[key] for each in events(self.folder, event) if key in each]


def density(rows: dict[str, dict[str, torch.Tensor]], kind: str) -> float:
    """Share of a kind's elements that are not 0."""
    values = [found[kind] for found in rows.values()]
    return sum(int(v.count_nonzero()) for v in values) / sum(v.numel() for v in values)


def best_two_of_four(master: torch.Tensor) -> torch.Tensor:
    groups = master.abs().view(-1, 4)
    best = groups.topk(2, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(master.shape)


def check_pruned(before: dict, after: dict) -> None:
    """The masks of the end are those of the weights that lived until then."""
    assert density(before, "master") == 1.0
    for kind in ("mask", "master", "seen", "exp_avg", "exp_avg_sq"):
        assert density(after, kind) == 0.5, kind
    changed = 0
    for name, rows in after.items():
        assert torch.equal(rows["mask"], best_two_of_four(before[name]["master"])), name
        assert torch.equal(rows["master"], before[name]["master"].where(rows["mask"], 0.0)), name
        changed += int((rows["mask"] != before[name]["mask"]).sum())
    assert changed  # the masks of two steps ago are others


def cast(folder: Path) -> None:
    """Every weight takes part until the last step, and then half of them."""
    run = Run(folder, "cast", settings(4, recipe("cast")))
    check_pruned(run.steps(4), run.rows())
    assert run.told("masks", "density") == [0.5, 0.5, 0.5]
    assert run.told("train_step", "mask_density") == [0.5] * 4
    assert run.told("train_step", "mean_density") == [1.0] * 4
    total = run.session.model.num_parameters()[0]
    assert run.told("train_step", "mean_params") == [total] * 4


def cast_with_a_skip(folder: Path) -> None:
    """The last update is skipped, and the end comes all the same."""
    config = settings(4, recipe("cast")) | {"optim": {"non_finite": "skip"}}
    run = Run(folder, "skip", config)
    run.steps(3)
    run.spoil_the_next_gradient()
    check_pruned(run.steps(1), run.rows())
    assert run.told("train_step", "skipped") == [False, False, False, True]
    assert run.told("masks", "step") == [0, 2, 4]


def cast_ends_early(folder: Path) -> None:
    """The phase ends at step 3 of 8: what is saved is pruned, and goes on so."""
    config = settings(8, recipe("cast"))
    run = Run(folder, "early", config)
    before = run.steps(3)
    run.session.end_phase(run.phase)
    check_pruned(before, run.rows())
    assert run.told("masks", "step") == [0, 2, 3]
    checkpoint = Checkpoint(list_checkpoints(run.folder / "checkpoints")[-1])
    exported = SparseCheckpoint(checkpoint)
    for name, rows in run.rows().items():
        assert torch.equal(exported.weight(name), rows["master"])
    resumed = Run(folder, "early", config, checkpoint.url)
    assert resumed.phase is None and resumed.session._sparse._flows == run.session._sparse._flows
    for name, rows in run.rows().items():
        for kind, values in resumed.rows()[name].items():
            assert torch.equal(values, rows[kind]), (name, kind)


def pgf_mask(folder: Path) -> None:
    """D(t) is 1, 2/3, 1/3 and 0: in the fourth step one of eight weights takes part."""
    run = Run(folder, "pgf_mask", settings(4, recipe("pgf_mask")))
    run.steps(2)
    rows = run.rows()
    assert (density(rows, "mask"), density(rows, "seen")) == (0.125, 1.0)
    for each in rows.values():
        off = ~each["mask"]
        torch.testing.assert_close(each["seen"][off], each["master"][off] / 3)
    run.steps(2)
    rows = run.rows()
    found = [density(rows, kind) for kind in ("mask", "seen", "master")]
    assert found == [0.125, 0.125, 1.0]
    assert run.told("train_step", "mask_density") == [0.125] * 4
    assert run.told("train_step", "mean_density")[-1] == (3 + 0.125) / 4


def acdc(folder: Path) -> None:
    """Dense, sparse, dense and sparse, two steps each; what comes back comes from 0."""
    run = Run(folder, "acdc", settings(8, recipe("acdc")))
    run.steps(4)
    rows = run.rows()
    assert (density(rows, "mask"), density(rows, "master")) == (1.0, 0.25)
    run.steps(4)
    rows = run.rows()
    for kind in ("mask", "seen", "master", "exp_avg", "exp_avg_sq"):
        assert density(rows, kind) == 0.25, kind
    assert run.told("masks", "step") == [0, 2, 4, 6]
    assert run.told("masks", "density") == [1.0, 0.25, 1.0, 0.25]
    assert run.told("train_step", "mean_density")[-1] == (2 * 1.0 + 2 * 0.25) / 4


def what_lives_is_dense_as_it_is(folder: Path) -> None:
    run = Run(folder, "densified", settings(4, STE_DENSIFIED))
    before, after = run.steps(2), run.rows()
    assert density(before, "master") == density(after, "seen") == density(after, "mask") == 1.0
    for name, rows in after.items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(rows[kind], before[name][kind]), (name, kind)
    run.steps(1)
    assert density(run.rows(), "seen") == 1.0


def a_window_of_skipped_steps(folder: Path) -> None:
    """It says nothing of what should grow; in the next one masks are traded again."""
    config = settings(5, GRADIENT) | {"optim": {"non_finite": "skip"}}
    run = Run(folder, "window", config)
    run.steps(1)
    run.spoil_the_next_gradient()
    run.steps(3)
    assert run.told("masks", "step") == [0, 2, 4]
    assert [bool(sad) for sad in run.told("masks", "sad")] == [True, False, True]
    assert run.told("masks", "density") == [0.25] * 3


def rules_of_several_intervals(folder: Path) -> None:
    """Flips are counted over the steps since each matrix's own last change."""
    ste = STE_DENSIFIED | {"match": ["*.experts.*_proj.weight"], "end": {}}
    run = Run(folder, "intervals", settings(5, ste, GRADIENT))
    run.steps(4)
    sizes = {"mlp": 0, "attn": 0}
    for name, rows in run.rows().items():
        sizes["mlp" if "experts" in name else "attn"] += rows["mask"].numel()
    told = [run.told("masks", key) for key in ("step", "sad", "flip_rate")]
    for step, sad, rate in zip(*told, strict=True):
        elements = sizes["mlp"] + (0 if step % 2 else sizes["attn"] * (2 if step else 1))
        assert rate == sad / elements, step


def replicas_share_masks_of_one_kind(folder: Path) -> None:
    """Rounds change masks of `masked` rules; those under which weights live are each replica's. A
    window that began before the last round is sent though its expert idles now."""
    lives = {
        "match": ["*.experts.*.up_proj.weight"],
        "distribution": {"kind": "global"},
        "schedule": {"density": 0.25, "every_steps": 2},
        "flow": {"kind": "soft"},
        "end": {"kind": "densify", "at": 0.75},
    }
    rigl = {
        "match": ["*.experts.*.gate_proj.weight"],
        "schedule": {"density": 0.25, "every_steps": 4},
        "regrow": {"criterion": "gradient", "window_steps": 4, "stop": 1.0},
    }
    config = settings(8, lives, rigl)
    config["outer"] = {
        "url": str(folder / "rounds"),
        "replica": "a",
        "rule": "averaging",
        "inner_steps": 2,
        "expected_replicas": 1,
    }
    run = Run(folder, "replica", config)
    before, after = run.steps(6), run.rows()
    assert run.told("masks", "density")[-1] == 0.625
    for name, rows in after.items():
        if "up_proj" in name:
            torch.testing.assert_close(rows["seen"], before[name]["master"])
            assert rows["mask"].all() and not before[name]["mask"].all()
        else:
            assert density({name: rows}, "mask") == 0.25
    outer = run.session._outer
    outer._load_LE.zero_()
    idle = outer._idle()
    gates = {name for name in after if "gate_proj" in name}
    assert {f"mask of {name}" for name in gates} < idle and gates < idle
    assert {f"window of {name}" for name in gates} < {name for name, _ in outer.replica.rows} - idle


def a_bit_that_differs(folder: Path) -> None:
    """A mask that loses a bit on its way into the shard ends the run."""
    from gossamer.parallel import masks

    spread = masks.spread_run

    def faulty(state: Any, run: Any, values: Any, shard: torch.Tensor) -> None:
        spread(state, run, values, shard)
        shard[state.local(run.start, run.stop)][-1] ^= True

    masks.spread_run = faulty
    with pytest.raises(RuntimeError, match="expected the same on every rank"):
        Run(folder, "bit", settings(1, GRADIENT))
    masks.spread_run = spread


CASES: tuple[Callable[[Path], None], ...] = (
    cast,
    cast_with_a_skip,
    cast_ends_early,
    pgf_mask,
    acdc,
    what_lives_is_dense_as_it_is,
    a_window_of_skipped_steps,
    rules_of_several_intervals,
    replicas_share_masks_of_one_kind,
    a_bit_that_differs,
)


def in_one_process(folder: str) -> dict[str, str]:
    import traceback

    faults = {}
    for case in CASES:
        try:
            case(Path(folder))
        except Exception:  # noqa: BLE001, each is told
            faults[case.__name__] = traceback.format_exc()
    return faults


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ends")
    config = build_config(TrainConfig, settings(4, recipe("cast")), "train")
    prepare_run(config, folder / "prepared", "test")
    return run_world(in_one_process, 1, str(folder))[0]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_in_a_run(faults, case):
    assert case not in faults, faults[case]
