"""SMoE-Dropout: a random router that never learns, and more experts per token as training goes on.

The one idea: with a frozen router the experts cannot collapse, a growing k is a regulariser that
fades, and the trained model may be run at any k: more experts, better answers.

Chen et al., 2023 (arXiv 2303.01610).
"""

from __future__ import annotations

from gossamer.trainer.moe.config import GrowingKConfig
from gossamer.trainer.moe.router import LinearRouter, RouterSpec, Routing
from torch import Tensor
from torch.nn import functional as F


class SMoEDropoutRouter(LinearRouter):
    """See the module. The weight given is the random one; it is kept as it is."""

    eval_k: int | None
    """Experts of a token in evaluation, to be set at will; None = as many as in training."""

    def __init__(self, weight_ED: Tensor, spec: RouterSpec) -> None:
        super().__init__(weight_ED, spec)
        self.weight.is_frozen = True  # type: ignore[attr-defined]
        self.eval_k = spec.moe.smoe_dropout.eval_k
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        self._train_k = k_at(step, self.spec.moe.smoe_dropout, self.num_experts)

    def forward(self, x_TD: Tensor, token_T: Tensor) -> Routing:
        top_k = self._train_k if self.training or self.eval_k is None else self.eval_k
        logits_TE = self.logits(x_TD)
        logits_TK, expert_TK = logits_TE.topk(min(top_k, self.num_experts), dim=-1)
        return Routing(expert_TK, F.softmax(logits_TK, -1), F.softmax(logits_TE, -1), logits_TE)

    def logits(self, x_TD: Tensor) -> Tensor:
        # the weight's gradient is 0, not missing: every engine can reduce it
        frozen_ED = self.weight.detach() + 0.0 * (self.weight - self.weight.detach())
        return self.logits_of(x_TD, frozen_ED)


def k_at(step: int, config: GrowingKConfig, num_experts: int) -> int:
    """Experts of a token in optimizer step `step`, at most all of them."""
    max_k = num_experts if config.max_k is None else config.max_k
    share = min(1.0, step / config.grow_steps)
    return min(config.min_k + round((max_k - config.min_k) * share), num_experts)
