"""One optimizer update: a batch in, gradients summed over ranks and micro-batches, a step, numbers.

The one idea: every loss is a sum divided by the global weight sum (those of routers: by the global
token count), which every rank knows because every rank is given the whole batch plan; so no mean is
ever taken of means, and the result does not depend on how rows were cut into ranks and
micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import Engine
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.losses import next_token_loss_sum
from gossamer.trainer.model import MoEModel
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.losses import load_metrics
from gossamer.trainer.moe.trace import RoutingTrace
from gossamer.trainer.rl.grpo import PolicyBatch, loss_divisor, policy_loss
from gossamer.trainer.step.flops import step_flops
from torch import Tensor


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Numbers of one update, equal on every rank."""

    loss: float
    """Mean over weighted tokens: nats for next_token, the surrogate (and its KL) for grpo."""
    balance_loss: float
    """Sum over layers, 1 a layer when balanced."""
    z_loss: float
    """Sum over layers of the mean of logsumexp(logits)^2; 0 when its coefficient is 0."""
    grad_norm: float
    """Before clipping; NaN when the update was skipped."""
    skipped: bool
    """The gradient was not finite: nothing was updated."""
    tokens: int
    """Real (not padding) tokens of the batch."""
    learned_tokens: int
    """Tokens with a weight in the loss."""
    flops: float
    """Of the model, forward and backward, over all ranks (trainer/step/flops.py)."""
    mean_ratio: float
    clip_share: float
    kl: float
    """To the reference policy, mean over learned tokens; 0 without rl.kl_coef."""
    expert_load: list[list[int]]
    """Tokens per expert (logical order) of each layer."""
    layers: dict[str, list[float]]
    """Of each layer: load_max_over_mean; load_entropy, 1 = even; dead_experts, those without a
    token; router_z, the mean of logsumexp(logits)^2; dropped_share, of (token, slot) pairs; bytes
    that dispatch and combine sent over all ranks, bytes_in_node and bytes_across nodes."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of the step's micro-batches."""

    losses: Tensor
    """[6]: loss sum, balance loss, z-loss, ratio sum, clipped tokens, KL sum; float64."""
    load_LE: Tensor
    z_L: Tensor


def update(
    model: MoEModel,
    engine: Engine,
    dims: ParallelDims,
    batch: TokenBatch,
    lr: float,
    config: TrainConfig,
    trace: RoutingTrace | None = None,
    updates: int | None = None,
) -> UpdateResult:
    """Forward, backward and step on the whole batch, of which this rank computes its rows.

    updates: how many the run has behind it, which routers go by; None: as the engine has taken.

    Raises FloatingPointError, on every rank and with nothing updated, for a gradient that is not
    finite, unless config.optim.non_finite is skip.
    """
    updates = engine.num_updates if updates is None else updates
    for block in model.blocks:
        block.begin_step(updates)
    tokens = int(batch.is_real_BS.sum())
    divisor, learned_tokens = loss_divisor(batch, config.rl), int((batch.weights_BS != 0).sum())
    sums = _accumulate(model, engine, dims, batch, tokens, divisor, config, trace, updates)
    traffic_L4 = torch.tensor([_traffic(block) for block in model.blocks])
    for tensor in (sums.losses, sums.load_LE, sums.z_L, traffic_L4):
        dist.all_reduce(tensor)
    try:
        grad_norm, skipped = engine.step(lr, config.optim.max_norm), False
    except FloatingPointError:
        if config.optim.non_finite == "raise":
            raise
        grad_norm, skipped = math.nan, True
    for block, load_E in zip(model.blocks, sums.load_LE, strict=True):
        if not skipped:
            block.gate.end_step(load_E)
    loss_sum, balance, z_loss, ratio_sum, clipped, kl_sum = sums.losses.tolist()
    layers = _layer_metrics(sums.load_LE, sums.z_L / max(tokens, 1), traffic_L4)
    kept_L = 1.0 - torch.tensor(layers["dropped_share"], dtype=torch.float64)
    pairs = round(float((sums.load_LE.sum(1) * kept_L).sum()))
    return UpdateResult(
        loss=loss_sum / divisor,
        balance_loss=balance,
        z_loss=z_loss,
        grad_norm=grad_norm,
        skipped=skipped,
        tokens=tokens,
        learned_tokens=learned_tokens,
        flops=step_flops(model, tokens, pairs, batch.token_ids_BS.shape[1]),
        mean_ratio=ratio_sum / learned_tokens,
        clip_share=clipped / learned_tokens,
        kl=kl_sum / learned_tokens,
        expert_load=sums.load_LE.tolist(),
        layers=layers,
    )


def _accumulate(
    model: MoEModel,
    engine: Engine,
    dims: ParallelDims,
    batch: TokenBatch,
    tokens: int,
    divisor: float,
    config: TrainConfig,
    trace: RoutingTrace | None,
    step: int,
) -> _Sums:
    """Forward and backward of this rank's micro-batches; all ranks have as many."""
    num_layers = len(model.blocks)
    mine = batch.split(dims.rank, dims.world_size)
    num_micro = -(-len(mine.token_ids_BS) // config.micro_rows)
    sums = _Sums(
        losses=torch.zeros(6, dtype=torch.float64),
        load_LE=torch.zeros(num_layers, model.blocks[0].num_experts, dtype=torch.int64),
        z_L=torch.zeros(num_layers, dtype=torch.float64),
    )
    z_coef = config.model.moe.z_loss_coef
    model.context.step_tokens = tokens
    for index in range(num_micro):
        part = mine.split(index, num_micro)
        first_row = dims.rank * len(mine.token_ids_BS) + index * len(part.token_ids_BS)
        _set_context(model.context, part, first_row, step, config)
        loss_sum, balance, z_loss, measured = _forward(model, engine, part, config)
        share = loss_sum / divisor + config.model.balance_loss_coef * balance
        if z_coef:
            share = share + z_coef * z_loss
        engine.backward(share, is_last=index == num_micro - 1)
        found = [loss_sum.detach(), balance.detach(), z_loss.detach(), *measured]
        sums.losses.add_(torch.stack(found).double())
        for layer, block in enumerate(model.blocks):
            block.end_micro_batch()
            sums.load_LE[layer] += block.statistics.count_E
            sums.z_L[layer] += block.statistics.z_sum
        if trace is not None:
            trace.write(step, model.module)
    return sums


def _traffic(block: MoEBlock) -> tuple[int, int, int, int]:
    """Of this rank since the step began: bytes in the node and across, pairs dropped and in all."""
    sent = block.dispatcher.traffic.take()
    in_node = sent.forward_in_node + sent.backward_in_node + sent.index_in_node
    across = sent.forward_across + sent.backward_across + sent.index_across
    return in_node, across, sent.dropped, sent.pairs


def _layer_metrics(load_LE: Tensor, mean_z_L: Tensor, traffic_L4: Tensor) -> dict[str, list[float]]:
    loads = [load_metrics(load_E) for load_E in load_LE]
    metrics = {name: [load[name] for load in loads] for name in loads[0]}
    in_node_L, across_L, dropped_L, pairs_L = traffic_L4.unbind(1)
    return metrics | {
        "router_z": mean_z_L.tolist(),
        "dropped_share": (dropped_L.double() / pairs_L.clamp(min=1)).tolist(),
        "bytes_in_node": in_node_L.tolist(),
        "bytes_across": across_L.tolist(),
    }


def _set_context(
    context: StepContext, part: TokenBatch, first_row: int, step: int, config: TrainConfig
) -> None:
    """first_row: of this micro-batch, in the global batch."""
    moe = config.model.moe
    context.is_real_T = part.is_real_BS.flatten()
    context.token_T = first_row * part.token_ids_BS.shape[1] + torch.arange(
        part.token_ids_BS.numel()
    )
    context.sequence_T = (part.position_ids_BS.flatten() == 0).cumsum(0) - 1
    context.step, context.balance_scope = step, moe.balance_scope
    context.has_z_loss = moe.z_loss_coef > 0


def _forward(
    model: MoEModel, engine: Engine, part: TokenBatch, config: TrainConfig
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(loss sum, balance loss, z-loss, (ratio sum, clipped tokens, KL sum)) of one micro-batch."""
    logits_BSV = engine.module(
        input_ids=part.token_ids_BS, position_ids=part.position_ids_BS, use_cache=False
    ).logits
    zero = logits_BSV.new_zeros(())
    balance = torch.stack([block.statistics.balance_loss for block in model.blocks]).sum()
    z_loss = torch.stack([block.statistics.z_loss for block in model.blocks]).sum()
    if isinstance(part, PolicyBatch):
        policy = policy_loss(logits_BSV, part, config.rl)
        measured = policy.ratio_sum, policy.clipped_sum, policy.kl_sum
        return policy.loss_sum, balance, z_loss, measured
    return next_token_loss_sum(logits_BSV, part), balance, z_loss, (zero, zero, zero)
