"""Capacity: which (token, slot) pairs an expert takes when it may not take all.

The one idea: sort the pairs by who comes first, then stably by expert; a pair's place in its
expert's queue says whether it stays. A policy is only a score to sort by. Each rank gives each
expert the same number of places for its own tokens, as Megatron-Core and DeepSpeed do, so nothing
is sent to decide; but what is dropped then depends on how rows are cut into ranks and batches.

Random token selection: Kim et al., 2021 (arXiv 2109.10465).

Shapes: T tokens of this rank, K slots (top-k), E experts, N = T * K pairs.
"""

from __future__ import annotations

import hashlib
import math

import torch
from gossamer.parallel.config import DispatchConfig
from torch import Tensor


def capacity_of(num_pairs: int, num_experts: int, factor: float) -> int:
    """Places of one expert for one rank: ceil(factor * even share)."""
    return math.ceil(factor * num_pairs / num_experts - 1e-9)  # 1.1 * 10 is 11, not 12


def kept_pairs(
    expert_TK: Tensor,
    weight_TK: Tensor,
    num_experts: int,
    config: DispatchConfig,
    step: int,
    layer: int,
    is_real_T: Tensor | None = None,
    is_used_TK: Tensor | None = None,
) -> Tensor:
    """kept_TK, bool: the pairs that find a place; padding comes last, whatever the policy.

    Pairs that are not used (spare slots of a router that fills fewer) take no place.
    The same for the same arguments, so a recomputed forward pass drops the same pairs.
    """
    assert config.capacity_factor is not None
    expert_N = expert_TK.flatten()
    if is_used_TK is not None:
        expert_N = expert_N.masked_fill(~is_used_TK.flatten(), num_experts)
    capacity = capacity_of(len(expert_N), num_experts, config.capacity_factor)
    score_N = _score(weight_TK.detach().flatten(), config, step, layer)
    if is_real_T is not None:
        is_real_N = is_real_T.repeat_interleave(expert_TK.shape[1])
        score_N = score_N.masked_fill(~is_real_N, -torch.inf)
    first_N = score_N.argsort(descending=True, stable=True)
    queue_N = first_N[expert_N[first_N].argsort(stable=True)]
    count_E = torch.bincount(expert_N, minlength=num_experts)
    start_E = count_E.cumsum(0) - count_E
    place_N = torch.arange(len(queue_N), device=queue_N.device) - start_E[expert_N[queue_N]]
    kept_N = torch.empty_like(expert_N, dtype=torch.bool)
    kept_N[queue_N] = place_N < capacity
    kept_TK = kept_N.view_as(expert_TK)
    return kept_TK if is_used_TK is None else kept_TK & is_used_TK


def _score(weight_N: Tensor, config: DispatchConfig, step: int, layer: int) -> Tensor:
    if config.drop_policy == "probability":
        return weight_N
    if config.drop_policy == "position":
        return torch.zeros_like(weight_N)
    key = f"{config.drop_seed}/{step}/{layer}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
    # drawn on the CPU: the same on every device
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(weight_N), generator=generator).to(weight_N.device)
