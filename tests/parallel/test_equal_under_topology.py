"""Losses and gradients do not depend on EP, DP or ZeRO stage (DECISIONS 11)."""

import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from gossamer.parallel.dims import build_dims
from gossamer.parallel.engine import Owned
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import DataConfig, ModelConfig, OptimConfig, PhaseConfig, TrainConfig
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.update import update

HF = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "vocab_size": 96,
    "initializer_range": 0.2,
}


def config_for(
    data: int, expert: int, zero_stage: int, micro_rows: int, levels: int = 1, hf: dict = HF
) -> TrainConfig:
    """The balance loss looks at a whole micro-batch, so it is on where there is only one.

    Half an expert group is a node.
    """
    balance_loss_coef = 0.01 if micro_rows == 8 else 0.0
    return TrainConfig(
        phases=(PhaseConfig(name="pretrain", kind="next_token", max_steps=2, lr=1e-2),),
        model=ModelConfig(hf=hf, balance_loss_coef=balance_loss_coef),
        data=DataConfig(task_share=0.0),
        optim=OptimConfig(max_norm=0.0),
        micro_rows=micro_rows,
        parallel=ParallelConfig(
            data=data,
            expert=expert,
            zero_stage=zero_stage,
            dispatch=DispatchConfig(levels=levels, ranks_per_node=max(1, expert // 2)),
        ),
    )


def fixed_batch(num_rows: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(7)
    token_ids_BS = torch.randint(1, 96, (num_rows, 12), generator=generator)
    position_ids_BS = torch.arange(12).repeat(num_rows, 1)
    position_ids_BS[:, 5:] -= 5  # two documents a row
    weights_BS = torch.ones(num_rows, 12)
    weights_BS[:, [4, 11]] = 0.0
    weights_BS[::3, 7] = 0.25
    return TokenBatch(
        token_ids_BS=token_ids_BS, position_ids_BS=position_ids_BS, weights_BS=weights_BS
    )


def train_on(
    data: int,
    expert: int,
    zero_stage: int,
    num_rows: int,
    micro_rows: int,
    levels: int = 1,
    hf: dict = HF,
) -> dict:
    """Losses of two updates, norm, expert load, and this rank's rows of first-update moments."""
    from gossamer.trainer.engine import build_engine

    config = config_for(data, expert, zero_stage, micro_rows, levels, hf)
    dims = build_dims(config.parallel)
    model = build_model(config.model, hf_config(config.model, {}), dims, seed=3)
    engine = build_engine(model, dims, config.parallel, config.optim)
    batch = fixed_batch(num_rows)
    first = update(model, engine, dims, batch, 1e-2, config)
    rows = [_plain(owned) for owned in engine.owned(with_moments=True)]
    second = update(model, engine, dims, batch, 1e-2, config)
    return {
        "losses": [first.loss, second.loss],
        "balance": first.balance_loss,
        "norm": first.grad_norm,
        "load": torch.tensor(first.expert_load),
        "rows": rows,
    }


def _plain(owned: Owned) -> tuple:
    return (
        owned.name,
        list(owned.shape),
        owned.row_start,
        owned.master.clone(),
        owned.moments["exp_avg"].clone(),
    )


def whole_tensors(ranks: list[dict], which: int) -> dict[str, torch.Tensor]:
    """Assembles each tensor from the rows its owners gave; every row exactly once."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for row in rank["rows"]:
            name, shape, start = row[:3]
            target = whole.setdefault(name, torch.full(shape, float("nan")))
            counts = seen.setdefault(name, torch.zeros(shape[0]))
            target[start : start + len(row[which])] = row[which]
            counts[start : start + len(row[which])] += 1
    assert all((counts == 1).all() for counts in seen.values())
    return whole


@pytest.fixture(scope="module")
def reference() -> dict:
    ranks = run_world(train_on, 1, 1, 1, 0, 8, 8)
    return {**ranks[0], "gradients": whole_tensors(ranks, 4), "masters": whole_tensors(ranks, 3)}


def train_on_all(world_size: int, is_whole: bool) -> dict:
    """Every topology of this world, one engine after another in the same processes.

    Unless it is to be the whole grid, two levels only at ZeRO-1.
    """
    return {
        f"{expert}/{zero_stage}/{levels}": train_on(
            world_size // expert, expert, zero_stage, 8, 8, levels
        )
        for expert in (1, 2, 4)
        if world_size // expert in (1, 2) and expert * (world_size // expert) == world_size
        for zero_stage in (0, 1, 2)
        for levels in ((1, 2) if expert > 1 and (is_whole or zero_stage == 1) else (1,))
    }


WHOLE_GRID = [pytest.param(world_size, True, marks=pytest.mark.slow) for world_size in (2, 4, 8)]


@pytest.mark.parametrize(
    ("world_size", "is_whole"), [(1, False), (2, False), (4, False), *WHOLE_GRID]
)
def test_same_loss_and_gradients_as_one_rank(reference, world_size, is_whole):
    """EP in {1, 2, 4} x DP in {1, 2} x ZeRO {0, 1, 2} x one or two levels of dispatch."""
    ranks = run_world(train_on_all, world_size, world_size, is_whole)
    for case in ranks[0]:
        found = [rank[case] for rank in ranks]
        check_against(reference, found)
        expert, zero_stage, levels = case.split("/")
        if levels == "2":  # dispatch in two steps changes no bit
            one_level = [rank[f"{expert}/{zero_stage}/1"] for rank in ranks]
            assert found[0]["losses"] == one_level[0]["losses"]
            for which in (3, 4):
                whole = whole_tensors(one_level, which)
                for name, tensor in whole_tensors(found, which).items():
                    assert torch.equal(tensor, whole[name]), (case, name)


def check_against(reference: dict, ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["losses"] == pytest.approx(reference["losses"], rel=1e-6)
        assert rank["balance"] == pytest.approx(reference["balance"], rel=1e-6)
        assert rank["norm"] == pytest.approx(reference["norm"], rel=1e-5)
        assert torch.equal(rank["load"], reference["load"])
    gradients, masters = whole_tensors(ranks, 4), whole_tensors(ranks, 3)
    assert gradients.keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        difference = (gradients[name] - expected).norm()
        assert difference <= 1e-5 * expected.norm(), (name, difference, expected.norm())
        assert (masters[name] - reference["masters"][name]).abs().max() < 1e-3


def train_in_micro_batches() -> dict:
    return {str(zero_stage): train_on(1, 2, zero_stage, 7, 2) for zero_stage in (0, 1)}


def test_rows_that_do_not_divide_over_ranks_and_micro_batches():
    """7 rows, 2 at a time, on 2 ranks: the missing rows are padding and count nowhere."""
    one = run_world(train_on, 1, 1, 1, 0, 7, 7)
    expected = whole_tensors(one, 4)
    ranks = run_world(train_in_micro_batches, 2)
    for zero_stage in ranks[0]:
        two = [rank[zero_stage] for rank in ranks]
        assert two[0]["losses"] == pytest.approx(one[0]["losses"], rel=1e-6)
        assert torch.equal(two[0]["load"], one[0]["load"])
        for name, gradient in whole_tensors(two, 4).items():
            difference = (gradient - expected[name]).norm()
            assert difference <= 1e-5 * expected[name].norm(), name
