"""Loss and gradients of our EP=2 beside transformers' eager experts and DeepSpeed's AutoEP.

One world of two ranks, the same weights (drawn from one seed), the same rows, float32.
"""

import logging

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.comm.names import logical_views
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import build_dims
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.model import build_model, hf_config
from test_equal_under_topology import HF
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

TOKEN_IDS_BS = torch.randint(1, 96, (8, 12), generator=torch.Generator().manual_seed(7))
MODEL = ModelConfig(hf=HF, balance_loss_coef=0.0)
SEED = 3


def their_model(experts: str) -> nn.Module:
    torch.manual_seed(SEED)
    config = hf_config(MODEL, {})
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )


def share_of_loss(module: nn.Module, ids_BS: Tensor) -> Tensor:
    """The sum over these rows, divided by the number of targets in all rows."""
    logits = module(input_ids=ids_BS, use_cache=False).logits[:, :-1]
    targets = ids_BS[:, 1:].flatten()
    loss_sum = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    return loss_sum / TOKEN_IDS_BS[:, 1:].numel()


def gradients(module: nn.Module, first_expert: int = 0) -> dict[str, Tensor]:
    views = logical_views(module.named_parameters(), first_expert)
    held = logical_views(((n, p.grad) for n, p in module.named_parameters()), first_expert)
    assert views.keys() == held.keys()
    return {name: gradient.clone() for name, gradient in held.items()}


def eager() -> dict:
    module = their_model("eager")
    loss = share_of_loss(module, TOKEN_IDS_BS)
    loss.backward()
    return {"loss": float(loss), "gradients": gradients(module)}


def ours(mine: Tensor) -> dict:
    dims = build_dims(ParallelConfig(expert=2))
    model = build_model(MODEL, hf_config(MODEL, {}), dims, SEED)
    loss = share_of_loss(model.module, mine)
    loss.backward()
    found = gradients(model.module, dims.local_experts(HF["num_experts"]).start)
    for name, gradient in found.items():
        if ".experts." not in name:
            dist.all_reduce(gradient)
    dist.all_reduce(total := loss.detach())
    return {"loss": float(total), "gradients": found}


def autoep(mine: Tensor) -> dict:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module = their_model("grouped_mm")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 0},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe"},
    }
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters()),
        config=settings,
        dist_init_required=False,
    )
    loss = share_of_loss(engine, mine)
    engine.backward(loss * 2)  # it takes the mean over the world
    dist.all_reduce(total := loss.detach())
    return {"loss": float(total), "gradients": autoep_gradients(engine.module)}


def autoep_gradients(module: nn.Module) -> dict[str, Tensor]:
    """By the checkpoint's names: AutoEP calls gate, down and up w1, w2 and w3, [e, ...] each."""
    found = {}
    for name, parameter in module.named_parameters():
        name = name.replace(".router.gate.", ".gate.")
        block, _, weight = name.partition(".experts.")
        if not weight:
            found[name] = parameter.grad.clone()
            continue
        kind = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[weight]
        for index, gradient in enumerate(parameter.grad):
            expert = dist.get_rank() * len(parameter.grad) + index
            found[f"{block}.experts.{expert}.{kind}.weight"] = gradient.clone()
    return found


def every_way() -> dict:
    mine = TOKEN_IDS_BS.chunk(2)[dist.get_rank()]
    return {"eager": eager(), "ours": ours(mine), "autoep": autoep(mine)}


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_world(every_way, 2)


@pytest.mark.parametrize("peer", ["eager", "autoep"])
def test_loss_and_gradients_are_the_peer_s(ranks, peer):
    names = set()
    for rank in ranks:
        assert rank["ours"]["loss"] == pytest.approx(rank[peer]["loss"], rel=1e-6)
        theirs = rank[peer]["gradients"]
        names |= rank["ours"]["gradients"].keys()
        for name, gradient in rank["ours"]["gradients"].items():
            difference = (gradient - theirs[name]).norm()
            assert difference <= 1e-5 * theirs[name].norm() > 0, (name, difference)
    assert names == ranks[0]["eager"]["gradients"].keys()  # all experts of both ranks
