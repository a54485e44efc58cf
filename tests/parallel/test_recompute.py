"""Recompute changes no bit of losses, gradients or weights, and no rank waits for another."""

from dataclasses import replace

import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig
from gossamer.parallel.dims import ParallelDims, build_dims
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import ModelConfig, TrainConfig
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.moe.config import DenseToSparseConfig, MoEConfig
from gossamer.trainer.moe.router import LinearRouter, Routing
from gossamer.trainer.update import update
from test_equal_under_topology import HF, config_for, fixed_batch
from torch import Tensor

KINDS = ("none", "moe", "block")


class CoinRouter(LinearRouter):
    """Draws experts from torch's own generator: two forward passes differ, unless replayed."""

    def forward(self, x_TD: Tensor, token_T: Tensor) -> Routing:
        logits_TE = self.logits(x_TD) + torch.randn(len(x_TD), self.num_experts)
        weight_TE = logits_TE.softmax(-1)
        weight_TK, expert_TK = weight_TE.topk(self.spec.top_k)
        return Routing(expert_TK, weight_TK, weight_TE, logits_TE)


SOFT = MoEConfig(z_loss_coef=0.01, dense_to_sparse=DenseToSparseConfig(threshold=0.2))
CASES = {
    "topk": ModelConfig(hf=HF, balance_loss_coef=0.01, moe=MoEConfig(z_loss_coef=0.01)),
    "sequence": ModelConfig(hf=HF, moe=MoEConfig(balance_scope="sequence")),
    "bias": ModelConfig(hf=HF, router="sigmoid_bias"),
    "gumbel": ModelConfig(hf=HF, router="dense_to_sparse", moe=SOFT),
    "growing": ModelConfig(hf=HF, router="smoe_dropout"),
    "coin": ModelConfig(hf=HF, router="test_recompute:CoinRouter"),
    "dropping": ModelConfig(hf=HF),
    "zero2": ModelConfig(hf=HF),
}


def uneven_batch() -> TokenBatch:
    """5 rows for 2 ranks: the second has rows of nothing, and fewer tokens in the others."""
    tensors = [tensor.clone() for tensor in fixed_batch(5).to_tensors()]
    for tensor in tensors:
        tensor[3, 4:] = 0
    return TokenBatch.from_tensors(tensors)


def test_statistics_are_those_of_the_first_pass():
    """Those of the second would keep alive what recompute is there to forget."""
    config = ModelConfig(hf=HF, recompute="block")
    alone = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
    model = build_model(config, hf_config(config, {}), alone, seed=3)
    batch, runs = fixed_batch(2), []
    model.blocks[0].gate.register_forward_hook(lambda *_: runs.append(1))
    logits = model.module(input_ids=batch.token_ids_BS, use_cache=False).logits
    first = [block.statistics for block in model.blocks]
    logits.sum().backward()
    assert len(runs) == 2
    assert all(b.statistics is f for b, f in zip(model.blocks, first, strict=True))


def config_of(case: str, recompute: str) -> TrainConfig:
    config = config_for(1, 2, 1, micro_rows=2)
    model = replace(CASES[case], recompute=recompute)
    dispatch = DispatchConfig(
        capacity_factor=0.8 if case == "dropping" else None, drop_policy="random"
    )
    stage = 2 if case == "zero2" else 1
    parallel = replace(config.parallel, dispatch=dispatch, zero_stage=stage)
    return replace(config, model=model, parallel=parallel)


def two_updates(case: str, recompute: str) -> dict:
    from gossamer.trainer.engine import build_engine

    config = config_of(case, recompute)
    dims = build_dims(config.parallel)
    model = build_model(config.model, hf_config(config.model, {}), dims, seed=3)
    engine = build_engine(model, dims, config.parallel, config.optim)
    torch.manual_seed(dims.rank)
    seen: dict[str, Tensor] = {}
    for step in range(2):
        result = update(model, engine, dims, uneven_batch(), 1e-2, config)
        losses = [result.loss, result.balance_loss, result.z_loss]
        numbers = [*losses, result.grad_norm, result.flops]
        seen[f"numbers {step}"] = torch.tensor(numbers, dtype=torch.float64)
        seen[f"load {step}"] = torch.tensor(result.expert_load)
        for name, per_layer in result.layers.items():
            seen[f"{name} {step}"] = torch.tensor(per_layer, dtype=torch.float64)
        for owned in engine.owned(with_moments=True):
            seen[f"master {owned.name} {step}"] = owned.master.clone()
            seen[f"gradient {owned.name} {step}"] = owned.moments["exp_avg"].clone()
    seen |= {name: buffer.clone() for name, buffer in model.buffers().items()}
    return seen


def all_cases() -> dict:
    return {
        f"{case}/{kind}/{name}": tensor
        for case in CASES
        for kind in KINDS
        for name, tensor in two_updates(case, kind).items()
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_world(all_cases, 2)


def part(rank: dict, case: str, kind: str) -> dict[str, Tensor]:
    prefix = f"{case}/{kind}/"
    return {k.removeprefix(prefix): v for k, v in rank.items() if k.startswith(prefix)}


@pytest.mark.parametrize("kind", ["moe", "block"])
@pytest.mark.parametrize("case", CASES)
def test_no_bit_changes(ranks, case, kind):
    for rank in ranks:
        expected, found = part(rank, case, "none"), part(rank, case, kind)
        different = [
            name
            for name in expected.keys() | found.keys()
            if not name.startswith("bytes_") and not torch.equal(expected[name], found[name])
        ]
        assert different == []


def test_the_cases_are_what_they_say(ranks):
    """Noise, drops and loads that differ between ranks: something to get wrong."""
    one = part(ranks[0], "dropping", "moe")
    assert 0 < one["dropped_share 0"].min() < 1
    pairs = one["load 0"].sum(1)
    dropped = float((pairs * one["dropped_share 0"]).sum())
    expert = 3 * HF["hidden_size"] * HF["moe_intermediate_size"]
    whole = part(ranks[0], "topk", "none")["numbers 0"][-1]
    assert float(whole - one["numbers 0"][-1]) == pytest.approx(6 * dropped * expert)
    topk, coin = (part(ranks[0], case, "none")["load 0"] for case in ("topk", "coin"))
    assert not torch.equal(topk, coin)
    bias = part(ranks[0], "bias", "block")
    assert any(values.abs().max() > 0 for n, values in bias.items() if n.endswith("_bias"))


@pytest.mark.parametrize("kind", ["moe", "block"])
def test_bytes_sent_again_are_counted_again(ranks, kind):
    """Four trips of a pair become six; counts go ahead of each dispatch."""
    sent, again = (part(ranks[0], "topk", k)["bytes_in_node 0"] for k in ("none", kind))
    assert torch.all(again > 1.49 * sent) and torch.all(again < 1.51 * sent)
