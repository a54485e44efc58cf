"""EvoMoE's dense-to-sparse gate: one expert, then all of them, then fewer and fewer.

The one idea: a Gumbel softmax whose temperature falls: at a high one every expert has a share of
every token and learns, at a low one almost all weight is on a few; experts whose weight is below a
threshold are left out, and at the end of the schedule the gate is top-k. Before that, expert 0 may
be trained alone, to be copied to the others with masks (trainer/moe/diversify.py).

The noise is a function of (seed, step, layer, token of the global batch, expert), so it does not
depend on the topology, on how rows are cut, or on whether a forward pass is run again.

Nie et al., 2021 (arXiv 2112.14397).
"""

from __future__ import annotations

import hashlib
import math

import torch
from gossamer.trainer.moe.config import DenseToSparseConfig
from gossamer.trainer.moe.router import LinearRouter, RouterSpec, Routing
from torch import Tensor


class DenseToSparseRouter(LinearRouter):
    """See the module. In evaluation it is top-k without noise."""

    def __init__(self, weight_ED: Tensor, spec: RouterSpec) -> None:
        super().__init__(weight_ED, spec)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        self._step = step

    def forward(self, x_TD: Tensor, token_T: Tensor) -> Routing:
        config, logits_TE = self.spec.moe.dense_to_sparse, self.logits(x_TD)
        if self._step < config.diversify_steps:
            return _first_expert(logits_TE)
        is_soft = self._step < config.diversify_steps + config.decay_steps
        if self.training and is_soft:
            return self._soft(logits_TE, token_T)
        probability_TE = logits_TE.softmax(dim=-1)
        weight_TK, expert_TK = probability_TE.topk(self.spec.top_k, dim=-1)
        if self.spec.is_renormalised:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return Routing(expert_TK, weight_TK, probability_TE, logits_TE)

    def _soft(self, logits_TE: Tensor, token_T: Tensor) -> Routing:
        config = self.spec.moe.dense_to_sparse
        noise_TE = gumbel(
            f"{self.spec.seed}/{self._step}/{self.spec.layer}", token_T, self.num_experts
        )
        temperature = temperature_at(self._step - config.diversify_steps, config)
        gate_TE = ((logits_TE + noise_TE.to(logits_TE.dtype)) / temperature).softmax(dim=-1)
        gate_TK, expert_TK = gate_TE.sort(dim=-1, descending=True, stable=True)
        is_used_TK = gate_TK > config.threshold
        is_used_TK[:, 0] = True
        # as many slots as the token with the most experts needs; spare ones weigh nothing
        num_slots = int(is_used_TK.sum(dim=-1).max()) if len(is_used_TK) else 1
        is_used_TK = is_used_TK[:, :num_slots]
        weight_TK = gate_TK[:, :num_slots] * is_used_TK
        return Routing(expert_TK[:, :num_slots], weight_TK, gate_TE, logits_TE, is_used_TK)


def _first_expert(logits_TE: Tensor) -> Routing:
    """Everything to expert 0; nothing to balance, and gradients of 0."""
    nothing_TE = 0.0 * logits_TE
    expert_TK = torch.zeros_like(logits_TE[:, :1], dtype=torch.int64)
    uniform_TE = nothing_TE + 1.0 / logits_TE.shape[1]
    return Routing(expert_TK, nothing_TE[:, :1] + 1.0, uniform_TE, logits_TE)


def temperature_at(step: int, config: DenseToSparseConfig) -> float:
    """Of the Gumbel softmax, `step` steps after it began."""
    share = min(1.0, step / config.decay_steps)
    low, high = config.min_temperature, config.max_temperature
    if config.decay == "linear":
        return high - (high - low) * share
    return high * math.exp(math.log(low / high) * share)


def gumbel(key: str, token_T: Tensor, num_experts: int) -> Tensor:
    """Standard Gumbel noise [T, E], float64: a pure function of key, token number and expert."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    expert_E = torch.arange(num_experts, device=token_T.device)
    counter_TE = token_T.unsqueeze(1) * num_experts + expert_E
    # splitmix64 (Steele et al., 2014) in wrapping int64
    bits = counter_TE * _int64(0x9E3779B97F4A7C15) + int.from_bytes(digest, signed=True)
    bits = (bits ^ _shift(bits, 30)) * _int64(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _int64(0x94D049BB133111EB)
    bits = bits ^ _shift(bits, 31)
    uniform_TE = (_shift(bits, 12).double() + 0.5) * 2.0**-52  # never 0, never 1
    return -torch.log(-torch.log(uniform_TE))


def _int64(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _shift(bits: Tensor, places: int) -> Tensor:
    """To the right, filling with zeros."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
