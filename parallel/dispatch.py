"""Token dispatch: tokens travel to the ranks that hold their experts, and results travel back.

The one idea: one stable sort by expert puts every (token, slot) pair in the order in which it is
sent, so one all-to-all with exact split counts moves them (dropless), one more sort groups what
arrived by local expert, and both inverses are index lists already at hand. Rows of one expert lie
in the order (source rank, token, slot), which is the order a single rank holding all tokens would
give them: that is what makes EP=1 and EP=N comparable to rounding.

Shapes: T tokens of this rank, K slots (top-k), D hidden, E experts, e local experts, R rows
received.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Route:
    """Where each row went, kept from `dispatch` for `combine`."""

    send_order_N: Tensor
    """(token * K + slot) of each sent row, N = T * K."""
    recv_order_R: Tensor
    """Permutation that groups received rows by local expert."""
    send_splits: list[int]
    recv_splits: list[int]
    num_slots: int


class _AllToAll(torch.autograd.Function):
    """Rows to ranks by exact split counts; backward sends the gradients the way back."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_ND: Tensor,
        send_splits: list[int],
        recv_splits: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.send_splits, ctx.recv_splits, ctx.group = send_splits, recv_splits, group  # type: ignore[attr-defined]
        return _exchange(x_ND, send_splits, recv_splits, group)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad_RD: Tensor
    ) -> tuple[Tensor, None, None, None]:
        grad_ND = _exchange(grad_RD, ctx.recv_splits, ctx.send_splits, ctx.group)  # type: ignore[attr-defined]
        return grad_ND, None, None, None


def _exchange(x: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((sum(recv), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), recv, send, group=group)
    return out


class Dispatcher:
    """Dropless dispatch and combine over the expert group; a local permutation when EP=1."""

    def __init__(self, dims: ParallelDims, num_experts: int) -> None:
        self.dims = dims
        self.num_experts = num_experts
        self.num_local_experts = len(dims.local_experts(num_experts))

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor) -> tuple[Tensor, Tensor, Route]:
        """Sends each token to its experts.

        Returns the received rows grouped by local expert x_RD, their counts per local expert
        count_e (int64), and the route back. A rank may receive no row: R = 0.
        """
        num_slots = expert_TK.shape[1]
        send_order_N = torch.argsort(expert_TK.flatten(), stable=True)
        count_E = torch.bincount(expert_TK.flatten(), minlength=self.num_experts)
        x_ND = x_TD[send_order_N // num_slots]
        group = self.dims.expert_group
        if group is None:
            identity = torch.arange(len(send_order_N), device=x_TD.device)
            route = Route(send_order_N, identity, [], [], num_slots)
            return x_ND, count_E, route

        sent_Ge = count_E.view(self.dims.expert, self.num_local_experts)
        received_Ge = torch.empty_like(sent_Ge)
        dist.all_to_all_single(received_Ge, sent_Ge, group=group)
        send_splits, recv_splits = sent_Ge.sum(1).tolist(), received_Ge.sum(1).tolist()
        x_RD = _AllToAll.apply(x_ND, send_splits, recv_splits, group)
        # rows arrive as (source, expert); a stable sort by expert keeps source order inside it
        expert_ids_e = torch.arange(self.num_local_experts, device=x_TD.device)
        expert_R = expert_ids_e.repeat(self.dims.expert).repeat_interleave(received_Ge.flatten())
        recv_order_R = torch.argsort(expert_R, stable=True)
        route = Route(send_order_N, recv_order_R, send_splits, recv_splits, num_slots)
        return x_RD[recv_order_R], received_Ge.sum(0), route

    def combine(self, y_RD: Tensor, route: Route) -> Tensor:
        """Brings expert outputs home: y_TKD, in each token's top-k slot order."""
        group = self.dims.expert_group
        y_ND = y_RD
        if group is not None:
            y_ND = _AllToAll.apply(
                y_RD[_inverse(route.recv_order_R)], route.recv_splits, route.send_splits, group
            )
        y_ND = y_ND[_inverse(route.send_order_N)]
        return y_ND.view(-1, route.num_slots, y_ND.shape[-1])


def _inverse(permutation_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(permutation_N)
    inverse_N[permutation_N] = torch.arange(len(permutation_N), device=permutation_N.device)
    return inverse_N
