"""The MoE block: route, dispatch, experts, combine; takes the place of a Hugging Face MoE block.

The one idea: the block holds only its rank's experts and knows nothing of ranks; the dispatcher
brings the tokens. What the step needs besides the output (balance loss, expert load) is left in
`statistics`, to be collected after the forward pass.

Balance loss: Switch Transformer (arXiv 2101.03961), with the token counts of the whole step's
ranks ("global batch" scope, arXiv 2501.11873), so that it is the same under any EP and DP.

Shapes: B rows, S positions, T = B * S tokens, K slots, E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from gossamer.parallel.dispatch import Dispatcher
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.router import Router
from torch import Tensor, nn


@dataclass(slots=True)
class StepContext:
    """What all blocks need to know of the current micro-batch; set before each forward pass."""

    is_real_T: Tensor | None = None
    """False for padding, which is routed but counts nowhere; None = all tokens count."""


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Left by one forward pass. Counts are over this rank's real tokens."""

    count_E: Tensor
    balance_loss: Tensor
    """This rank's share; the sum over ranks is E * sum_e f_e P_e of the whole micro-batch. 0 where
    the block was built without."""


class MoEBlock(nn.Module):
    """x_BSD -> x_BSD. Names follow the checkpoint: gate.weight, experts.*, shared_experts.*."""

    statistics: BlockStatistics
    """Of the last forward pass; not there before the first."""

    def __init__(
        self,
        gate: Router,
        experts: GroupedExperts,
        dispatcher: Dispatcher,
        context: StepContext,
        has_balance_loss: bool,
        shared_experts: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.shared_experts = shared_experts
        self.num_experts = dispatcher.num_experts
        self._dispatcher, self._context = dispatcher, context
        self._has_balance_loss = has_balance_loss

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.gate(x_TD)
        self.statistics = self._measure(routing.expert_TK, routing.probability_TE)
        x_RD, count_e, route = self._dispatcher.dispatch(x_TD, routing.expert_TK)
        y_TKD = self._dispatcher.combine(self.experts(x_RD, count_e), route)
        # summed in slot order: placement changes no bit
        y_TD = (y_TKD * routing.weight_TK.to(y_TKD.dtype).unsqueeze(-1)).sum(dim=1)
        y_BSD = y_TD.view_as(x_BSD)
        return y_BSD if self.shared_experts is None else y_BSD + self.shared_experts(x_BSD)

    def _measure(self, expert_TK: Tensor, probability_TE: Tensor) -> BlockStatistics:
        is_real_T = self._context.is_real_T
        if is_real_T is not None:
            expert_TK, probability_TE = expert_TK[is_real_T], probability_TE[is_real_T]
        count_E = torch.bincount(expert_TK.flatten(), minlength=self.num_experts)
        if not self._has_balance_loss:
            return BlockStatistics(count_E, probability_TE.new_zeros(()))
        total_E = count_E.clone()
        if dist.is_initialized():
            dist.all_reduce(total_E)
        slots = total_E.sum().clamp(min=1)
        tokens = (slots // expert_TK.shape[1]).clamp(min=1)  # no real token anywhere: 0, not NaN
        share_E = total_E.to(probability_TE.dtype) / slots
        loss = self.num_experts * (share_E * probability_TE.sum(0)).sum() / tokens
        return BlockStatistics(count_E, loss)
