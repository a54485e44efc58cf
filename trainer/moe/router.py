"""Routers: which experts a token goes to, and with what weight.

The one idea: a router sees hidden states and answers three tensors; everything else (dispatch,
balance loss, metrics) is computed from those, so a new router is one class in one file.

Shapes: T tokens, K slots (top-k), E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROUTERS = {"topk_softmax": "gossamer.trainer.moe.router:TopKSoftmaxRouter"}


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for T tokens."""

    expert_TK: Tensor
    """Expert ids, int64, best first."""
    weight_TK: Tensor
    """Combine weights, in the router's precision (float32 at least)."""
    probability_TE: Tensor
    """Scores over all experts that the balance loss is taken of."""


class Router(Protocol):
    """A module that routes. Its parameters keep the checkpoint's names."""

    def __call__(self, x_TD: Tensor) -> Routing:
        """Routes T tokens; differentiable in weight_TK and probability_TE."""
        ...


class TopKSoftmaxRouter(nn.Module):
    """Softmax over all experts, then the top K, renormalised or not (Mixtral, Qwen3-MoE).

    Computed in float32 whatever the model's dtype, float64 stays float64.
    """

    def __init__(self, weight_ED: Tensor, top_k: int, is_renormalised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_ED)
        self.top_k, self.is_renormalised = top_k, is_renormalised

    def forward(self, x_TD: Tensor) -> Routing:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        probability_TE = logits_TE.softmax(dim=-1)
        weight_TK, expert_TK = probability_TE.topk(self.top_k, dim=-1)
        if self.is_renormalised:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return Routing(expert_TK, weight_TK, probability_TE)
