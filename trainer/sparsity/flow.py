"""How masked weights take part in a step: forward pass, gradient, optimizer.

The one idea: a flow is today's numbers, and formulas of (weight, mask, gradient) that hold for any
slice of a matrix; all choose by where(), for 0 x NaN is NaN.

STE and SR-STE: Zhou et al., 2021 (arXiv 2102.04010). D(t): Progressive Gradient Flow, Bambhaniya et
al., 2024 (arXiv 2402.04744). AST: Huang et al., 2025 (arXiv 2407.20584). AdamS: CAST, 2025 (arXiv
2509.25996).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gossamer.trainer.sparsity.config import FlowConfig
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Flow:
    """The flow of one step. Tensors of a call have one shape, any; masks are bool."""

    kind: str = "masked"
    """masked, ste, soft or dense: see FlowConfig."""
    keep: float = 0.0
    """soft: D(t), what the forward pass takes of masked weights."""
    decay: float = 0.0
    """Pull of masked weights towards 0."""
    place: str = "gradient"
    """Where `decay` acts: gradient, decoupled, ast or adams."""
    mix: float = 0.0
    """adams: share of the first moment that the pull replaces, for masked weights."""

    @property
    def keeps_dense(self) -> bool:
        """Masked weights live on; else weight, gradient and moments are 0 where the mask is."""
        return self.kind != "masked"

    @property
    def replaces_adamw(self) -> bool:
        """The optimizer's step is `adamw`, not AdamW's."""
        return self.place != "gradient" and self.decay > 0.0

    def forward(self, weight: Tensor, mask: Tensor) -> Tensor:
        """What the forward pass multiplies with."""
        if self.kind == "dense":
            return weight
        masked = weight * self.keep if self.keep else weight.new_zeros(())
        return weight.where(mask, masked)

    def gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """The weight's gradient, from the one of what the forward pass multiplied with."""
        if not self.keeps_dense:
            return gradient.where(mask, gradient.new_zeros(()))
        if self.decay and self.place == "gradient":
            return gradient.where(mask, gradient + self.decay * weight)
        return gradient

    def adamw(
        self,
        weight: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        mask: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """Step number `step`, from 1, in place: torch's AdamW with the pull in it.

        The first moment that is kept is of the loss alone. Of ast and adams the second moment, of
        masked and kept weights, is that of the first as it is applied, not of the gradient.
        """
        beta1, beta2 = betas
        pull = (self.decay * weight).masked_fill(mask, 0.0)
        weight.mul_(1.0 - lr * weight_decay)
        exp_avg.lerp_(gradient, 1.0 - beta1)
        applied, squared = exp_avg, gradient
        if self.place == "ast":
            applied = squared = exp_avg + pull
        elif self.place == "adams":
            pulled = (1.0 - self.mix) * exp_avg + self.mix * self.decay * pull.sign()
            applied = squared = exp_avg.where(mask, pulled)
        exp_avg_sq.mul_(beta2).addcmul_(squared, squared, value=1.0 - beta2)
        root = (exp_avg_sq.sqrt() / math.sqrt(1.0 - beta2**step)).add_(eps)
        weight.addcdiv_(applied, root, value=-lr / (1.0 - beta1**step))
        if self.place == "decoupled":
            weight.sub_(pull, alpha=lr)


def flow_at(config: FlowConfig, number: int, total_steps: int, share: float) -> Flow:
    """The flow of step `number`, from 1; share: of the window that is done, or outside 0 to 1."""
    ramp = config.ramp * total_steps
    risen = min(1.0, number / ramp) if ramp else 1.0
    keep = 0.0
    if config.kind == "soft" and share < 1.0:
        u = config.rate * max(0.0, share)
        keep = max(0.0, 1.0 - u) if config.softening == "linear" else math.exp(-u)
    if config.decay_place == "adams":
        return Flow(config.kind, keep, config.decay, "adams", mix=risen)
    return Flow(config.kind, keep, config.decay * risen, config.decay_place)
