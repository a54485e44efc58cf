"""Token dispatch: tokens travel to the ranks that hold their experts, and results travel back.

The one idea: one stable sort by expert puts every (token, slot) pair in the order in which it is
sent, and rows of one expert lie in the order (source rank, token, slot), which is the order a
single rank holding all tokens would give them: that makes EP=1 and EP=N comparable to rounding.
Whatever path the rows take there and back, gradients and results come home pair by pair and are
summed in slot order, so the path changes no bit.

Shapes: T tokens of this rank, K slots (top-k), D hidden, E experts, e local experts, N pairs that
are sent (T * K when nothing is dropped), R rows received.
"""

from __future__ import annotations

from typing import Protocol

import torch
from gossamer.parallel.capacity import kept_pairs
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.route import Pairs, grouping, inverse
from gossamer.parallel.traffic import Link, Traffic
from gossamer.parallel.two_level import TwoLevelPath
from torch import Tensor


class Path(Protocol):
    """The way of one layer's rows to their experts and back. `kind`: forward or backward."""

    count_e: Tensor
    """Rows of each local expert, int64."""

    def send_tokens(self, x_TD: Tensor, kind: str) -> Tensor:
        """Each token to its experts: x_RD grouped by local expert."""
        ...

    def send_pairs(self, x_ND: Tensor, kind: str) -> Tensor:
        """The same for a row of its own for each pair."""
        ...

    def bring_home(self, x_RD: Tensor, kind: str) -> Tensor:
        """The inverse of send_pairs."""
        ...


class LocalPath:
    """EP=1: nothing travels, the sort by expert is all there is."""

    def __init__(self, pairs: Pairs) -> None:
        self._token_N, self.count_e = pairs.token_N, pairs.count_E

    def send_tokens(self, x_TD: Tensor, kind: str) -> Tensor:
        return x_TD.index_select(0, self._token_N)

    def send_pairs(self, x_ND: Tensor, kind: str) -> Tensor:
        return x_ND

    def bring_home(self, x_RD: Tensor, kind: str) -> Tensor:
        return x_RD


class OneLevelPath:
    """One all-to-all over the expert group; a row for each pair."""

    def __init__(self, pairs: Pairs, dims: ParallelDims, link: Link) -> None:
        sent_Ge = pairs.count_E.view(dims.expert, -1)
        received_Ge = link.exchange_evenly(sent_Ge)
        self._send, self._recv = torch.stack([sent_Ge.sum(1), received_Ge.sum(1)]).tolist()
        self._token_N, self._link = pairs.token_N, link
        self.count_e = received_Ge.sum(0)
        # rows arrive as (source, expert); a stable sort by expert keeps source order inside it
        expert_Ge = torch.arange(len(self.count_e), device=sent_Ge.device).expand_as(received_Ge)
        self._order_R = grouping(expert_Ge, received_Ge, sum(self._recv))

    def send_tokens(self, x_TD: Tensor, kind: str) -> Tensor:
        return self.send_pairs(x_TD.index_select(0, self._token_N), kind)

    def send_pairs(self, x_ND: Tensor, kind: str) -> Tensor:
        x_RD = self._link.exchange(x_ND, self._send, self._recv, kind)
        return x_RD.index_select(0, self._order_R)

    def bring_home(self, x_RD: Tensor, kind: str) -> Tensor:
        x_RD = x_RD.index_select(0, inverse(self._order_R))
        return self._link.exchange(x_RD, self._recv, self._send, kind)


class Route:
    """Where each row went, kept from `dispatch` for `combine`."""

    def __init__(self, pairs: Pairs, path: Path) -> None:
        self.pairs, self.path = pairs, path


class _Dispatch(torch.autograd.Function):
    """x_TD -> x_RD; gradients come home pair by pair and are summed in slot order."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_TD: Tensor, route: Route) -> Tensor:
        ctx.route = route  # type: ignore[attr-defined]
        return route.path.send_tokens(x_TD, "forward")

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad_RD: Tensor
    ) -> tuple[Tensor, None]:
        route: Route = ctx.route  # type: ignore[attr-defined]
        grad_ND = route.path.bring_home(grad_RD, "backward")
        return route.pairs.sum_slots(grad_ND), None


class _Combine(torch.autograd.Function):
    """y_RD, weight_TK -> y_TD; gradients go the way of dispatch, a row for each pair."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, y_RD: Tensor, weight_TK: Tensor, route: Route
    ) -> Tensor:
        y_ND = route.path.bring_home(y_RD, "forward")
        ctx.route = route  # type: ignore[attr-defined]
        ctx.save_for_backward(y_ND, weight_TK)
        return route.pairs.sum_slots(y_ND, weight_TK)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad_TD: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        route: Route = ctx.route  # type: ignore[attr-defined]
        y_ND, weight_TK = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TD = grad_TD.contiguous()
        grad_TK = route.pairs.slot_products(grad_TD, y_ND)
        grad_ND = grad_TD.index_select(0, route.pairs.token_N)
        grad_ND *= weight_TK.flatten()[route.pairs.order_N].unsqueeze(1)
        return route.path.send_pairs(grad_ND, "backward"), grad_TK, None


class Dispatcher:
    """Dispatch and combine of one layer over the expert group, as dims.dispatch says."""

    def __init__(self, dims: ParallelDims, num_experts: int, layer: int = 0) -> None:
        self.dims, self.num_experts, self.layer = dims, num_experts, layer
        self.num_local_experts = len(dims.local_experts(num_experts))
        self.traffic = Traffic()
        """What this rank sent and dropped; `take` starts counting anew."""
        per_node, own = dims.ranks_per_node, dims.expert_rank // dims.ranks_per_node
        nodes = [rank // per_node for rank in range(dims.expert)]
        self._link = Link(dims.expert_group, [node != own for node in nodes], self.traffic)
        self._node = Link(dims.node_group, [False] * per_node, self.traffic)
        self._rail = Link(
            dims.rail_group, [node != own for node in range(dims.num_nodes)], self.traffic
        )

    def kept(
        self,
        expert_TK: Tensor,
        weight_TK: Tensor,
        step: int,
        is_real_T: Tensor | None = None,
        is_used_TK: Tensor | None = None,
    ) -> Tensor | None:
        """kept_TK: the used pairs that find a place under the capacity factor; None = all.

        `step` (the optimizer's) and the layer are the seed of random token selection. Padding,
        where `is_real_T` is False, comes last and is not counted as dropped.
        """
        config = self.dims.dispatch
        if config.capacity_factor is None:
            return is_used_TK
        kept_TK = kept_pairs(
            expert_TK, weight_TK, self.num_experts, config, step, self.layer, is_real_T, is_used_TK
        )
        used_TK = torch.ones_like(kept_TK) if is_used_TK is None else is_used_TK
        real_TK = used_TK if is_real_T is None else used_TK & is_real_T.unsqueeze(1)
        self.traffic.pairs += int(real_TK.sum())
        self.traffic.dropped += int((real_TK & ~kept_TK).sum())
        return kept_TK

    def dispatch(
        self, x_TD: Tensor, expert_TK: Tensor, kept_TK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Route]:
        """Sends each token to its experts, for the pairs that are kept (None = all).

        Returns the received rows grouped by local expert x_RD, their counts per local expert
        count_e (int64), and the route back. A rank may receive no row: R = 0.
        """
        pairs = Pairs(expert_TK, self.num_experts, kept_TK)
        path: Path
        if self.dims.rail_group is not None:
            path = TwoLevelPath(pairs, self.dims, self._rail, self._node)
        elif self.dims.expert_group is not None:
            path = OneLevelPath(pairs, self.dims, self._link)
        else:
            path = LocalPath(pairs)
        route = Route(pairs, path)
        return _Dispatch.apply(x_TD, route), path.count_e, route

    def combine(self, y_RD: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
        """Brings expert outputs home: y_TD, times their weights and summed in slot order.

        A dropped pair adds 0, and its weight gets a gradient of 0.
        """
        return _Combine.apply(y_RD, weight_TK.to(y_RD.dtype), route)
