"""bf16 with float32 masters: the engine's AdamW is PyTorch's own, bit for bit.

At ZeRO-0 DeepSpeed is not: it takes a step with zero gradients when it is built, which the config
refuses; the second test notices when that is mended.
"""

import logging

import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import build_dims
from torch import nn

pytestmark = pytest.mark.slow
LR, STEPS = 3e-3, 20


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))


def loss_of(module: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return (module(x.bfloat16()).float() - x[:, :1].sin()).square().mean()


def adamw(groups: object) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=LR, weight_decay=0.01)


def plain(has_empty_step: bool) -> list[float]:
    module = network().bfloat16()
    masters = [p.detach().float() for p in module.parameters()]
    optimizer, losses = adamw(masters), []
    if has_empty_step:
        for master in masters:
            master.grad = torch.zeros_like(master)
        optimizer.step()
    for step in range(STEPS):
        module.zero_grad()
        loss = loss_of(module, step)
        loss.backward()
        for master, parameter in zip(masters, module.parameters(), strict=True):
            master.grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, module.parameters(), strict=True):
                parameter.copy_(master)
        losses.append(float(loss.detach()))
    return losses


def through_the_engine(zero_stage: int) -> list[float]:
    from gossamer.parallel.deepspeed_engine import DeepSpeedEngine

    module = network()
    segments = {n: [(n, tuple(p.shape))] for n, p in module.named_parameters()}
    config = ParallelConfig(zero_stage=zero_stage, compute_dtype="bfloat16")
    # one group: decay on all, as in `adamw`
    engine = DeepSpeedEngine(
        module, [], segments, build_dims(config), config, adamw, lambda name, parameter: True
    )
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine.module, step)
        engine.backward(loss, is_last=True)
        engine.step(LR, max_norm=0.0)
        losses.append(float(loss.detach()))
    return losses


def deepspeed_stage_0() -> list[float]:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module = network()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    optimizer = adamw(module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_the_engine_steps_as_plain_pytorch_does(zero_stage):
    assert run_world(through_the_engine, 1, zero_stage)[0] == plain(has_empty_step=False)


def test_stage_0_of_deepspeed_is_a_step_ahead():
    found = run_world(deepspeed_stage_0, 1)[0]
    assert found == plain(has_empty_step=True) != plain(has_empty_step=False)
