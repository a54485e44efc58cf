"""The MoE block: route, dispatch, experts, combine; takes the place of a Hugging Face MoE block.

The one idea: the block holds only its rank's experts and knows nothing of ranks; the dispatcher
brings the tokens. What the step needs besides the output (losses, expert load) is left in
`statistics`, to be collected after the forward pass; a second one (recompute) leaves nothing.

Shapes: B rows, S positions, T = B * S tokens, K slots, E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from gossamer.parallel.dispatch import Dispatcher
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.losses import balance_loss, sequence_balance_loss, squared_logsumexp
from gossamer.trainer.moe.router import Router, Routing
from torch import Tensor, nn


@dataclass(slots=True)
class StepContext:
    """What all blocks need to know of the current micro-batch; set before each forward pass."""

    is_real_T: Tensor | None = None
    """False for padding, which is routed but counts nowhere; None = all tokens count."""
    token_T: Tensor | None = None
    """Number of each token in the step's global batch, int64; None = counted from 0."""
    sequence_T: Tensor | None = None
    """Which of this micro-batch's documents each token is of; None = one document a row."""
    step: int = 0
    """Optimizer steps done."""
    step_tokens: int | None = None
    """Real tokens of the step, over ranks and micro-batches, that losses are divided by; None =
    those of the micro-batch."""
    is_recomputing: bool = False
    """True in a forward pass that runs again for its activations: it leaves no statistics."""
    balance_scope: str = "global_batch"
    """See MoEConfig."""
    has_z_loss: bool = False


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """Left by one forward pass. Counts are over this rank's real tokens."""

    count_E: Tensor
    balance_loss: Tensor
    """This rank's share; the sum over ranks (and, with step_tokens, micro-batches) is
    E * sum_e f_e P_e. 0 where the block was built without."""
    z_loss: Tensor
    """This rank's share, as above; 0 where the context asks for none."""
    z_sum: Tensor
    """Sum over tokens of logsumexp(logits)^2, without gradient."""
    expert_TK: Tensor
    """What was chosen, as the router put it; spare slots hold -1."""
    total_E: Tensor
    """count_E of all ranks; without losses this rank's."""


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
        self.dispatcher, self._context = dispatcher, context
        self._has_balance_loss = has_balance_loss
        self.physical_E: Tensor | None = None
        """Physical id of each logical expert (see Placement); None = its own. Routing, losses,
        capacity and counts are logical; dispatch and experts are physical."""
        self._earlier_E: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.gate(x_TD, self._token_numbers(x_TD))
        statistics = self._measure(routing, rows=x_BSD.shape[0])
        if not self._context.is_recomputing:  # the second ones would keep its activations alive
            self.statistics = statistics
        kept_TK = self.dispatcher.kept(
            routing.expert_TK,
            routing.weight_TK,
            self._context.step,
            self._context.is_real_T,
            routing.is_used_TK,
        )
        physical_TK = self._physical(routing.expert_TK)
        x_RD, count_e, route = self.dispatcher.dispatch(x_TD, physical_TK, kept_TK)
        # summed in slot order: placement changes no bit
        y_TD = self.dispatcher.combine(self.experts(x_RD, count_e), routing.weight_TK, route)
        y_BSD = y_TD.view_as(x_BSD)
        return y_BSD if self.shared_experts is None else y_BSD + self.shared_experts(x_BSD)

    def _physical(self, expert_TK: Tensor) -> Tensor:
        return expert_TK if self.physical_E is None else self.physical_E[expert_TK]

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch of optimizer step `step`."""
        self.gate.train(True)
        self.gate.begin_step(step)
        self._earlier_E = None
        self.dispatcher.traffic.take()  # an evaluation's counts

    def end_micro_batch(self) -> None:
        """After its backward pass: later ones of the step balance against its load, too."""
        total_E = self.statistics.total_E
        self._earlier_E = total_E if self._earlier_E is None else self._earlier_E + total_E

    def _token_numbers(self, x_TD: Tensor) -> Tensor:
        token_T = self._context.token_T
        return torch.arange(len(x_TD), device=x_TD.device) if token_T is None else token_T

    def _measure(self, routing: Routing, rows: int) -> BlockStatistics:
        context, expert_TK = self._context, routing.expert_TK
        probability_TE, logits_TE = routing.probability_TE, routing.logits_TE
        sequence_T = context.sequence_T
        if sequence_T is None:
            places = torch.arange(len(expert_TK), device=expert_TK.device)
            sequence_T = places // max(1, len(expert_TK) // max(1, rows))
        if routing.is_used_TK is not None:
            expert_TK = expert_TK.masked_fill(~routing.is_used_TK, -1)
        is_real_T = context.is_real_T
        if is_real_T is not None:
            expert_TK, sequence_T = expert_TK[is_real_T], sequence_T[is_real_T]
            probability_TE, logits_TE = probability_TE[is_real_T], logits_TE[is_real_T]
        chosen = expert_TK.flatten()
        if routing.is_used_TK is not None:
            chosen = chosen[chosen >= 0]
        count_E = torch.bincount(chosen, minlength=self.num_experts)
        with torch.set_grad_enabled(torch.is_grad_enabled() and context.has_z_loss):
            z_sum = squared_logsumexp(logits_TE)
        balance, z_loss, total_E = z_sum.new_zeros(()), z_sum.new_zeros(()), count_E
        if self._has_balance_loss or context.has_z_loss:
            summed = torch.cat([count_E, count_E.new_tensor([len(expert_TK)])])
            if dist.is_initialized():
                dist.all_reduce(summed)
            total_E, tokens = summed[:-1], summed[-1]
            if context.step_tokens is not None:
                tokens = torch.full_like(tokens, context.step_tokens)
            tokens = tokens.clamp(min=1)  # no token anywhere: 0, not NaN
            if self._has_balance_loss:
                balance = self._balance(
                    expert_TK, count_E, total_E, probability_TE, sequence_T, tokens
                )
            if context.has_z_loss:
                z_loss = z_sum / tokens
        return BlockStatistics(count_E, balance, z_loss, z_sum.detach(), expert_TK, total_E)

    def _balance(
        self,
        expert_TK: Tensor,
        count_E: Tensor,
        total_E: Tensor,
        probability_TE: Tensor,
        sequence_T: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        scope = self._context.balance_scope
        if scope == "sequence":
            num_sequences = int(sequence_T.max()) + 1 if len(sequence_T) else 0
            place_TK = sequence_T.unsqueeze(1) * self.num_experts + expert_TK
            count_N = torch.bincount(
                place_TK[expert_TK >= 0], minlength=num_sequences * self.num_experts
            )
            count_QE = count_N.view(num_sequences, self.num_experts)
            return sequence_balance_loss(count_QE, probability_TE, sequence_T, tokens)
        load_E = count_E
        if scope == "global_batch":
            load_E = total_E if self._earlier_E is None else total_E + self._earlier_E
        share_E = load_E.to(probability_TE.dtype) / load_E.sum().clamp(min=1)
        return balance_loss(share_E, probability_TE, tokens)
