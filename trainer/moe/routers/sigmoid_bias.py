"""Sigmoid scores with a bias that balances the load instead of a loss; group-limited or not.

The one idea: a bias per expert is added to the scores for choosing alone. After every optimizer
step it moves by a fixed amount towards the experts that the whole global batch used too little, so
a second forward pass (recompute) counts nothing twice. With groups, experts outside a token's best
groups are out of its choice; a group is as good as the sum of its two best experts.

Loss-free balancing: Wang et al., 2024 (arXiv 2408.15664). Groups: DeepSeek-V3 (arXiv 2412.19437),
as transformers computes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gossamer.trainer.moe.router import LinearRouter, RouterSpec, Routing
from torch import Tensor


class SigmoidBiasRouter(LinearRouter):
    """See the module. The bias is the buffer `e_score_correction_bias`, float32 always."""

    e_score_correction_bias: Tensor

    def __init__(self, weight_ED: Tensor, spec: RouterSpec) -> None:
        super().__init__(weight_ED, spec)
        if self.num_experts % spec.num_groups or spec.top_groups > spec.num_groups:
            raise ValueError(
                f"n_group={spec.num_groups} and topk_group={spec.top_groups} for"
                f" {self.num_experts} experts; expected a divisor, and at most that many groups"
            )
        if spec.top_k > self.num_experts // spec.num_groups * spec.top_groups:
            raise ValueError(
                f"num_experts_per_tok={spec.top_k}; expected at most the"
                f" {self.num_experts // spec.num_groups * spec.top_groups} experts of"
                f" topk_group={spec.top_groups} groups"
            )
        given = spec.bias_E
        bias_E = torch.zeros(self.num_experts) if given is None else given.detach().float().clone()
        self.register_buffer("e_score_correction_bias", bias_E.to(weight_ED.device))

    def forward(self, x_TD: Tensor, token_T: Tensor) -> Routing:
        logits_TE = self.logits(x_TD)
        score_TE = logits_TE.sigmoid()
        choice_TE = self._within_best_groups(score_TE.detach() + self.e_score_correction_bias)
        expert_TK = choice_TE.topk(self.spec.top_k, dim=-1).indices
        weight_TK = score_TE.gather(1, expert_TK)
        if self.spec.is_renormalised:
            weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)
        probability_TE = score_TE / (score_TE.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(expert_TK, weight_TK * self.spec.scale, probability_TE, logits_TE)

    def _within_best_groups(self, choice_TE: Tensor) -> Tensor:
        if self.spec.num_groups == 1:
            return choice_TE
        choice_TGe = choice_TE.unflatten(1, (self.spec.num_groups, -1))
        group_TG = choice_TGe.topk(min(2, choice_TGe.shape[-1]), dim=-1).values.sum(dim=-1)
        best_Tg = group_TG.topk(self.spec.top_groups, dim=-1, sorted=False).indices
        is_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, best_Tg, False)
        return choice_TGe.masked_fill(is_out_TG.unsqueeze(-1), float("-inf")).flatten(1)

    @torch.no_grad()
    def end_step(self, count_E: Tensor) -> None:
        mean = count_E.double().mean()
        direction_E = torch.sign(mean - count_E.double()).float()
        self.e_score_correction_bias += self.spec.moe.bias_update_rate * direction_E

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidBiasRouter:
        """A model cast to bfloat16 keeps this buffer's bits: its steps are too small for that."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self
