"""Routers: which experts a token goes to, and with what weight (seam: Router).

The one idea: a router sees hidden states and answers a few tensors; everything else (dispatch,
losses, metrics) is computed from those, so a new router is one file in routers/ and one line in
config.py.
What changes over a run is a function of the optimizer step, or moves once per step by `end_step`.

Shapes: T tokens, K slots (top-k), E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from gossamer.trainer.moe.config import MoEConfig
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """What a router is built for: the checkpoint's own settings, and the run's."""

    top_k: int
    """Experts of a token, unless the router says otherwise."""
    is_renormalised: bool = False
    """Combine weights add up to 1 (HF: norm_topk_prob)."""
    scale: float = 1.0
    """Combine weights are multiplied by this (HF: routed_scaling_factor)."""
    num_groups: int = 1
    """Neighbouring experts form groups (HF: n_group)."""
    top_groups: int = 1
    """A token's experts are all in this many groups (HF: topk_group)."""
    bias_E: Tensor | None = None
    """The checkpoint's e_score_correction_bias, float32."""
    layer: int = 0
    """Of the model; tells the noise of one layer from another's."""
    seed: int = 0
    """Of the run's noise."""
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for T tokens."""

    expert_TK: Tensor
    """Expert ids, int64, K different ones, best first."""
    weight_TK: Tensor
    """Combine weights, in the router's precision (float32 at least)."""
    probability_TE: Tensor
    """Scores over all experts, adding up to 1, that the balance loss is taken of."""
    logits_TE: Tensor
    """What the z-loss is taken of."""
    is_used_TK: Tensor | None = None
    """False for slots of weight 0 that only fill up to K, and count nowhere; None = all are."""


class Router(Protocol):
    """A module that routes. Its parameters and buffers keep the checkpoint's names."""

    def __call__(self, x_TD: Tensor, token_T: Tensor) -> Routing:
        """Routes T tokens; differentiable in weight_TK and probability_TE.

        token_T: the number of each token in the step's global batch, int64, to draw noise by.
        Noise and what else is for training alone go by `self.training`.
        """
        ...

    def train(self, mode: bool) -> object:
        """nn.Module's: whether what follows is training or evaluation."""
        ...

    def begin_step(self, step: int) -> None:
        """Before the first forward pass of optimizer step `step` (from 0), and on resuming."""
        ...

    def end_step(self, count_E: Tensor) -> None:
        """After the optimizer step: tokens per expert of the whole global batch, int64."""
        ...


class LinearRouter(nn.Module):
    """What most routers share: a matrix, its logits in float32 at least, and no schedule."""

    def __init__(self, weight_ED: Tensor, spec: RouterSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_ED)
        self.spec = spec
        self.num_experts = len(weight_ED)

    def logits(self, x_TD: Tensor) -> Tensor:
        """logits_TE, in float32 whatever the model's dtype; float64 stays float64."""
        return self.logits_of(x_TD, self.weight)

    @staticmethod
    def logits_of(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """As `logits`, of another weight."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))

    def begin_step(self, step: int) -> None:
        """See Router."""

    def end_step(self, count_E: Tensor) -> None:
        """See Router."""
