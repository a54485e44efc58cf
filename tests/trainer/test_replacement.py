"""Experts that move in the middle of training change no bit of what is learned."""

import numpy as np
import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from gossamer.parallel.dims import build_dims
from gossamer.parallel.placement.placement import Placement
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import DataConfig, ModelConfig, OptimConfig, PhaseConfig, TrainConfig
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.optim import build_adamw, decays
from gossamer.trainer.update import update

E, LAYERS = 8, 2
RUNS = {"still": {}, "moved": {0: 5, 1: 1, 3: 2}}
"""Before which step experts move, by which seed."""
HF = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "tie_word_embeddings": False,
    "vocab_size": 96,
    "initializer_range": 0.2,
}


def shuffled(seed: int, ranks: int) -> Placement:
    random = np.random.default_rng(seed)
    slots_LS = np.stack([random.permutation(E) for _ in range(LAYERS)])
    return Placement(slots_LS=slots_LS, ranks=ranks, layers=tuple(range(LAYERS)))


def fixed_batch(seed: int, rows: int = 8, length: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    return TokenBatch(
        token_ids_BS=torch.randint(4, 96, (rows, length), generator=generator),
        position_ids_BS=torch.arange(length).repeat(rows, 1),
        weights_BS=torch.ones(rows, length),
    )


class World:
    """One rank, with its model, its engine and where its experts live."""

    def __init__(self, parallel: ParallelConfig, **model: object) -> None:
        from gossamer.parallel.deepspeed_engine import DeepSpeedEngine
        from gossamer.trainer.placement import PlacedExperts

        self.config = TrainConfig(
            phases=(PhaseConfig(name="p", kind="next_token", max_steps=9, lr=1e-2),),
            model=ModelConfig(hf=HF, balance_loss_coef=0.01, **model),
            data=DataConfig(task_share=0.0),
            optim=OptimConfig(max_norm=0.5),
            parallel=parallel,
        )
        self.dims = build_dims(parallel)
        self.model = build_model(self.config.model, hf_config(self.config.model, {}), self.dims, 3)
        self.engine = DeepSpeedEngine(
            self.model.module,
            self.model.blocks,
            self.model.segments,
            self.dims,
            parallel,
            lambda groups: build_adamw(groups, self.config.optim),
            decays,
        )
        self.experts = PlacedExperts(self.model, self.engine, self.dims)

    def update(self, seed: int) -> dict:
        """Numbers of a step on a batch of its own."""
        result = update(self.model, self.engine, self.dims, fixed_batch(seed), 1e-2, self.config)
        return {
            "loss": result.loss,
            "balance": result.balance_loss,
            "norm": result.grad_norm,
            "load": torch.tensor(result.expert_load),
            "dropped": result.layers["dropped_share"],
        }

    def rows(self) -> dict[str, torch.Tensor]:
        """What this rank owns, by kind|name|first row."""
        return {
            f"{kind}|{owned.name}|{owned.row_start}": values.clone()
            for owned in self.engine.owned(with_moments=True)
            for kind, values in {"master": owned.master, **owned.moments}.items()
        }


def train(layout: dict, moves: dict[int, int], dispatch: dict, **model: object) -> dict:
    """Four steps; before step s, experts move to the placement of seed moves[s]."""
    parallel = ParallelConfig(**layout, dispatch=DispatchConfig(**dispatch))
    world, steps, sent = World(parallel, **model), [], 0
    for step in range(4):
        if step in moves:
            sent += world.experts.place(shuffled(moves[step], parallel.expert))
        steps.append(world.update(step))
    return {"steps": steps, "rows": world.rows(), "sent": sent}


def train_each(layouts: dict[str, dict]) -> dict:
    """In each layout: undisturbed, and with experts moved before the first step and twice later."""
    return {
        name: {which: train(layout, moves, {}) for which, moves in RUNS.items()}
        for name, layout in layouts.items()
    }


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Tensors by kind|name from the rows of all ranks, each row once."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for rank in ranks:
        for key, values in rank["rows"].items():
            stem, _, start = key.rpartition("|")
            assert int(start) not in pieces.setdefault(stem, {})
            pieces[stem][int(start)] = values
    return {stem: torch.cat([rows[s] for s in sorted(rows)]) for stem, rows in pieces.items()}


def assert_same(ranks: list[dict], name: str) -> None:
    """The run `name` ends as the undisturbed one, bit by bit, and had the same numbers."""
    for rank in ranks:
        for still, moved in zip(rank["still"]["steps"], rank[name]["steps"], strict=True):
            for key, value in still.items():
                found = moved[key]
                same = torch.equal(found, value) if key == "load" else found == value
                assert same, (name, key, found, value)
    expected, found = (whole([rank[which] for rank in ranks]) for which in ("still", name))
    assert expected.keys() == found.keys()
    assert len([k for k in expected if ".experts." in k]) == 3 * 3 * E * LAYERS
    for key, values in expected.items():
        assert torch.equal(found[key], values), (name, key)
    assert sum(rank[name]["sent"] for rank in ranks) > 0


def assert_each_same(layouts: dict[str, dict], world_size: int) -> None:
    for name, layout in layouts.items():
        assert layout["expert"] * layout.get("data", 1) == world_size, name
    ranks = run_world(train_each, world_size, layouts)
    for name in layouts:
        of_layout = [rank[name] for rank in ranks]
        assert len({step["loss"] for step in of_layout[0]["still"]["steps"]}) == 4
        assert_same(of_layout, "moved")


def test_a_run_whose_experts_move_is_the_run_in_which_they_stay():
    assert_each_same({"EP=2 ZeRO-1": {"expert": 2}}, 2)
    assert_each_same({"EP=4 ZeRO-1": {"expert": 4}, "with DP": {"data": 2, "expert": 2}}, 4)


@pytest.mark.slow
def test_so_it_is_at_other_zero_stages():
    layouts = {
        f"EP={expert} DP={4 // expert} ZeRO-{stage}": {
            "expert": expert,
            "data": 4 // expert,
            "zero_stage": stage,
        }
        for expert in (2, 4)
        for stage in (0, 2)
    }
    assert_each_same(layouts, 4)
