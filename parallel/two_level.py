"""Dispatch in two steps: across nodes on a rail, then inside the node.

The one idea: a token crosses to a node once, however many of its experts live there, to the rank
that has its sender's place on that node (the ranks of one place are a "rail"); with it go the
positions of its pairs, and the rank on the other side hands copies to its neighbours. Results and
gradients come home pair by pair: summing them on the other side would cross less, and would change
bits.

As in HierMoE (arXiv 2508.09591) and DeepEP, without their sums on the far side.

Shapes: T tokens, N pairs of this rank, U (token, node) rows that it sends, P pairs that it hands
on, R rows that its experts get; M nodes, L ranks of a node, e local experts.
"""

from __future__ import annotations

import torch
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.route import Pairs, grouping, inverse
from gossamer.parallel.traffic import Link
from torch import Tensor


class TwoLevelPath:
    """See Path in dispatch.py; rows reach the experts in the very order of OneLevelPath."""

    def __init__(self, pairs: Pairs, dims: ParallelDims, rail: Link, node: Link) -> None:
        self._rail, self._node = rail, node
        shape_MLe = (dims.num_nodes, dims.ranks_per_node, len(pairs.count_E) // dims.expert)
        sent_ML_e = pairs.count_E.view(dims.num_nodes, -1)
        self._token_U, tokens_M, place_N = _once_per_node(pairs, sent_ML_e.sum(1))

        heads = rail.exchange_evenly(torch.cat([sent_ML_e, tokens_M.unsqueeze(1)], dim=1))
        passed_MLe = heads[:, :-1].reshape(shape_MLe)
        received_LMe = node.exchange_evenly(passed_MLe.transpose(0, 1).contiguous())
        self.count_e = received_LMe.sum((0, 1))
        rail_counts = torch.stack(
            [sent_ML_e.sum(1), passed_MLe.sum((1, 2)), tokens_M, heads[:, -1]]
        ).tolist()
        self._pairs_out, self._pairs_in, self._tokens_out, self._tokens_in = rail_counts
        self._node_out, self._node_in = torch.stack(
            [passed_MLe.sum((0, 2)), received_LMe.sum((1, 2))]
        ).tolist()

        place_P = rail.exchange(place_N.int(), self._pairs_out, self._pairs_in, "index")
        first_M = heads[:, -1].cumsum(0) - heads[:, -1]
        row_P = place_P + first_M.repeat_interleave(passed_MLe.sum((1, 2)))
        # pairs came as (source node, rank, expert) and leave as (rank, source node, expert)
        rank_L1 = torch.arange(dims.ranks_per_node, device=row_P.device).unsqueeze(1)
        self._order_P = grouping(rank_L1.expand(shape_MLe), passed_MLe, len(row_P))
        self._row_P = row_P[self._order_P]
        # they came as (place, source node, expert) and lie as (expert, source node, place)
        place, source, expert = (torch.arange(n, device=row_P.device) for n in received_LMe.shape)
        key_LMe = (
            expert * dims.expert + source.view(-1, 1) * dims.ranks_per_node + place.view(-1, 1, 1)
        )
        self._order_R = grouping(key_LMe, received_LMe, sum(self._node_in))

    def send_tokens(self, x_TD: Tensor, kind: str) -> Tensor:
        x_UD = x_TD.index_select(0, self._token_U)
        x_UD = self._rail.exchange(x_UD, self._tokens_out, self._tokens_in, kind)
        return self._hand_on(x_UD.index_select(0, self._row_P), kind)

    def send_pairs(self, x_ND: Tensor, kind: str) -> Tensor:
        x_PD = self._rail.exchange(x_ND, self._pairs_out, self._pairs_in, kind)
        return self._hand_on(x_PD.index_select(0, self._order_P), kind)

    def _hand_on(self, x_PD: Tensor, kind: str) -> Tensor:
        x_RD = self._node.exchange(x_PD, self._node_out, self._node_in, kind)
        return x_RD.index_select(0, self._order_R)

    def bring_home(self, x_RD: Tensor, kind: str) -> Tensor:
        x_RD = x_RD.index_select(0, inverse(self._order_R))
        x_PD = self._node.exchange(x_RD, self._node_in, self._node_out, kind)
        x_PD = x_PD.index_select(0, inverse(self._order_P))
        return self._rail.exchange(x_PD, self._pairs_in, self._pairs_out, kind)


def _once_per_node(pairs: Pairs, pairs_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token of each (node, token) row; how many of them a node gets; each pair's row there."""
    num_pairs, num_nodes = len(pairs.token_N), len(pairs_M)
    nodes_M = torch.arange(num_nodes, device=pairs_M.device)
    node_N = nodes_M.repeat_interleave(pairs_M, output_size=num_pairs)
    is_sent_MT = torch.zeros(num_nodes, pairs.num_tokens, dtype=torch.bool, device=pairs_M.device)
    is_sent_MT[node_N, pairs.token_N] = True
    place_MT = is_sent_MT.cumsum(1) - 1
    return is_sent_MT.nonzero()[:, 1], is_sent_MT.sum(1), place_MT[node_N, pairs.token_N]
