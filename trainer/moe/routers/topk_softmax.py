"""Top-k softmax: the router of Mixtral, Qwen3-MoE and OLMoE.

The one idea: a softmax over all experts, of which the K largest are kept, renormalised or not; or
the softmax over the K largest logits alone.
"""

from __future__ import annotations

from gossamer.trainer.moe.router import LinearRouter, Routing
from torch import Tensor


class TopKSoftmaxRouter(LinearRouter):
    """See the module."""

    def forward(self, x_TD: Tensor, token_T: Tensor) -> Routing:
        logits_TE = self.logits(x_TD)
        probability_TE = logits_TE.softmax(dim=-1)
        if self.spec.moe.softmax_after_topk:
            logits_TK, expert_TK = logits_TE.topk(self.spec.top_k, dim=-1)
            weight_TK = logits_TK.softmax(dim=-1)
        else:
            weight_TK, expert_TK = probability_TE.topk(self.spec.top_k, dim=-1)
            if self.spec.is_renormalised:
                weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return Routing(expert_TK, weight_TK, probability_TE, logits_TE)
