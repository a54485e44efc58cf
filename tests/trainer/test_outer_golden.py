"""One round of two real trainers, against the same round worked out by hand from two that know
nothing of each other."""

from pathlib import Path

import pytest
import torch
from gossamer.comm.names import logical_views
from gossamer.launch.recipe import build_config
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.prepare import load_run_tokenizer
from outer_runs import Running, finish, settings
from tiny_run import events

STEPS = 3
LR, MOMENTUM = 0.7, 0.9


def of_three_steps(name: str, index: int, rounds: Path, **outer) -> dict:
    config = settings(name, index, 2, rounds, inner_steps=STEPS, clip_to_median=0.0, **outer)
    config["phases"][0]["max_steps"] = STEPS
    return config


def masters(run_dir: Path, kind: str = "master") -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])
    shapes = checkpoint.shapes
    return {name: checkpoint.rows(name, 0, shape[0], kind) for name, shape in shapes.items()}


def initial(run_dir: Path, config: dict) -> dict[str, torch.Tensor]:
    """The weights that every replica begins with."""
    built = build_config(TrainConfig, config, "train")
    hf = hf_config(built.model, load_run_tokenizer(run_dir).hf_fields())
    dims = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
    model = build_model(built.model, hf, dims, built.seed)
    return logical_views(model.module.named_parameters(), 0, hf.model_type)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict, list[dict]]:
    """(the weights at first, those of each of two that train alone)."""
    root = tmp_path_factory.mktemp("alone")
    configs = [of_three_steps(name, i, root) for i, name in enumerate("ab")]
    start = configs[0]
    for config in configs:
        del config["outer"]
    running = [Running(root / str(i), config) for i, config in enumerate(configs)]
    finish(*running)
    trained = [masters(root / str(i)) for i in range(2)]
    return initial(root / "0", start), trained


@pytest.mark.parametrize("rule", ["averaging", "diloco"])
def test_a_round_of_two_trainers_is_the_one_worked_out_by_hand(alone, tmp_path, rule):
    start, (one, other) = alone
    configs = [of_three_steps(n, i, tmp_path / "rounds", rule=rule) for i, n in enumerate("ab")]
    finish(*[Running(tmp_path / str(i), config) for i, config in enumerate(configs)])
    found, second = masters(tmp_path / "0"), masters(tmp_path / "1")
    assert found.keys() == start.keys()
    for name, weights in start.items():
        mean = ((weights - one[name]) + (weights - other[name])) / 2
        step = mean
        if rule == "diloco":  # its momentum begins as the mean
            step = (mean * MOMENTUM + mean) * LR
        assert torch.equal(found[name], weights - step), name
        assert torch.equal(found[name], second[name]), name
    (told,) = events(tmp_path / "0", "outer_round")
    assert told["counted"] == ["a", "b"] and told["step"] == STEPS
    # float32, of which the codec saves the rows of tokens that were not seen
    dense = sum(weights.nbytes for weights in start.values())
    assert dense / 2 < told["wire_bytes_sent"] < told["wire_bytes_read"] < 3 * dense
