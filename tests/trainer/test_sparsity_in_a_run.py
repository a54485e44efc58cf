"""A run's state around changes of masks: what was pruned is gone, what grew starts at nothing."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from tiny_run import SETTINGS

STEPS, DENSE_AT = 7, 6
RIGL = {
    "match": ["*.experts.*.gate_proj.weight", "*.experts.*.up_proj.weight"],
    "distribution": {"kind": "erk"},
    "schedule": {"density": 0.4, "every_steps": 2},
    "regrow": {"criterion": "gradient", "share": 0.5, "stop": 1.0},
}
SET = RIGL | {
    "match": ["*.experts.*.down_proj.weight"],
    "regrow": {"criterion": "random", "share": 0.5, "stop": 1.0},
}
SPDF = {
    "match": ["*.self_attn.*_proj.weight"],
    "schedule": {"density": 0.25},
    "end": {"kind": "densify", "at": DENSE_AT / STEPS, "reset_moments": True, "rewarm": 3 / STEPS},
}


def settings(world: int) -> dict:
    phase = {"name": "pretrain", "kind": "next_token", "max_steps": STEPS, "lr": 0.01}
    found = copy.deepcopy(SETTINGS)
    found |= {"phases": [phase], "sparsity": {"rules": [RIGL, SET, SPDF]}, "task": None}
    found["data"]["task_share"] = 0.0
    found["parallel"] = {"expert": world, "zero_stage": world - 1}
    return found


def watched(run_dir: str, world: int) -> dict[str, list]:
    """By kind of matrix, of each change: (step, density before, after, grown, weights and moments
    of grown that are not 0, the same of what is masked)."""
    from gossamer.trainer.session import RunPlace, Session

    config = build_config(TrainConfig, settings(world), "train")
    session = Session(
        config, RunPlace(run_dir=Path(run_dir), name="test"), None, on_checkpoint=lambda step: None
    )
    session.start()
    phase, seen = session.phase(), {"up_proj": [], "down_proj": [], "self_attn": [], "lr": []}

    def rows() -> dict:
        found = {}
        for each in session.engine.owned(with_moments=True):
            if "mask" in each.moments:
                kept = {"master": each.master, **each.moments}
                found[each.name, each.row_start] = {k: v.clone() for k, v in kept.items()}
        return found

    for step in range(1, STEPS + 1):
        session.update(phase)
        seen["lr"].append(session._lr)
        before = rows()
        session.sync_replicas(phase)
        after = rows()
        for kind in ("up_proj", "down_proj", "self_attn"):
            count = torch.zeros(5, dtype=torch.int64)
            for place in (place for place in after if kind in place[0]):
                old, new = before[place]["mask"], after[place]["mask"]
                grown = new & ~old
                state = [after[place][key] for key in ("master", "exp_avg", "exp_avg_sq")]
                count += torch.tensor(
                    [
                        int(old.sum()),
                        int(new.sum()),
                        int(grown.sum()),
                        sum(int(values[grown].count_nonzero()) for values in state),
                        sum(int(values[~new].count_nonzero()) for values in state),
                    ]
                )
            dist.all_reduce(count)
            seen[kind].append([step, *count.tolist()])
    return seen


def spoilt(run_dir: str, config: dict) -> str:
    """What ends a run in which the second rank's masks lose a bit on their way into its shard."""
    from gossamer.parallel import masks
    from gossamer.trainer.session import RunPlace, Session

    spread = masks.spread_run

    def faulty(state, run, values, shard) -> None:
        spread(state, run, values, shard)
        local = shard[state.local(run.start, run.stop)]
        if dist.get_rank() == 1 and len(local):
            local[-1] ^= True

    masks.spread_run = faulty
    place = RunPlace(run_dir=Path(run_dir), name="test")
    try:
        Session(build_config(TrainConfig, config, "train"), place, None, lambda step: None)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_bit_that_differs_between_ranks_ends_the_run(tmp_path, zero_stage):
    config = settings(1)
    config["parallel"] = {"data": 2, "expert": 1, "zero_stage": zero_stage}
    prepare_run(build_config(TrainConfig, config, "train"), tmp_path, "test")
    for error in run_world(spoilt, 2, str(tmp_path), config):
        assert "expected the same on every rank" in error


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rigl_set_and_spdf_change_masks_and_nothing_of_the_old_weights_stays(tmp_path, world):
    prepare_run(build_config(TrainConfig, settings(world), "train"), tmp_path, "test")
    seen, *others = run_world(watched, world, str(tmp_path), world)
    assert others == [seen] * (world - 1)
    for kind in ("up_proj", "down_proj"):
        changed = [step for step, _, _, grown, _, _ in seen[kind] if grown]
        assert changed == [2, 4, 6], kind
        for step, before, after, _, alive, masked in seen[kind]:
            assert before == after, (kind, step)
            assert alive == masked == 0, (kind, step)
    for step, before, after, grown, alive, masked in seen["self_attn"]:
        assert masked == 0
        assert (grown, alive) == ((after - before, 0) if step == DENSE_AT else (0, 0))
    assert seen["self_attn"][-1][1] == 4 * seen["self_attn"][0][1]
    assert seen["lr"] == pytest.approx([0.01] * DENSE_AT + [0.01 / 3])
