"""One optimizer update: a batch in, gradients summed over ranks and micro-batches, a step, numbers.

The one idea: every loss is a sum divided by the global weight sum, which every rank knows because
every rank is given the whole batch plan; so no mean is ever taken of means, and the result does not
depend on how rows were cut into ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import Engine
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.losses import next_token_loss_sum
from gossamer.trainer.model import MoEModel
from gossamer.trainer.rl.grpo import PolicyBatch, policy_loss
from gossamer.trainer.tokenizer import PAD_ID
from torch import Tensor


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Numbers of one update, equal on every rank."""

    loss: float
    """Mean over weighted tokens: nats for next_token, the surrogate for grpo."""
    balance_loss: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Real (not padding) tokens of the batch."""
    learned_tokens: int
    """Tokens with a weight in the loss."""
    mean_ratio: float
    clip_share: float
    expert_load: list[list[int]]
    """Tokens per expert (logical order) of each layer."""


def update(
    model: MoEModel,
    engine: Engine,
    dims: ParallelDims,
    batch: TokenBatch,
    lr: float,
    config: TrainConfig,
) -> UpdateResult:
    """Forward, backward and step on the whole batch, of which this rank computes its rows."""
    mine = batch.split(dims.rank, dims.world_size)
    num_micro = -(-len(mine.token_ids_BS) // config.micro_rows)
    weight_sum = float(batch.weights_BS.double().sum())
    sums = torch.zeros(4, dtype=torch.float64)
    load_LE = torch.zeros(len(model.blocks), model.blocks[0].num_experts, dtype=torch.int64)
    for index in range(num_micro):
        part = mine.split(index, num_micro)
        loss_sum, balance, measured = _forward(model, engine, part, config)
        share = loss_sum / weight_sum + config.model.balance_loss_coef * balance / num_micro
        engine.backward(share, is_last=index == num_micro - 1)
        sums += torch.stack([loss_sum.detach(), balance.detach() / num_micro, *measured]).double()
        load_LE += torch.stack([block.statistics.count_E for block in model.blocks])
    dist.all_reduce(sums)
    dist.all_reduce(load_LE)
    grad_norm = engine.step(lr, config.optim.max_norm)
    loss_sum, balance, ratio_sum, clipped = sums.tolist()
    return UpdateResult(
        loss=loss_sum / weight_sum,
        balance_loss=balance,
        grad_norm=grad_norm,
        tokens=int((batch.token_ids_BS != PAD_ID).sum()),
        learned_tokens=int((batch.weights_BS != 0).sum()),
        mean_ratio=ratio_sum / weight_sum,
        clip_share=clipped / weight_sum,
        expert_load=load_LE.tolist(),
    )


def _forward(
    model: MoEModel, engine: Engine, part: TokenBatch, config: TrainConfig
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(loss sum, balance loss, (ratio sum, clipped tokens)) of one micro-batch."""
    model.context.is_real_T = (part.token_ids_BS != PAD_ID).flatten()
    logits_BSV = engine.module(
        input_ids=part.token_ids_BS, position_ids=part.position_ids_BS, use_cache=False
    ).logits
    zero = logits_BSV.new_zeros(())
    balance = torch.stack([block.statistics.balance_loss for block in model.blocks]).sum()
    if isinstance(part, PolicyBatch):
        policy = policy_loss(logits_BSV, part, config.rl)
        return policy.loss_sum, balance, (policy.ratio_sum, policy.clipped_sum)
    return next_token_loss_sum(logits_BSV, part), balance, (zero, zero)
