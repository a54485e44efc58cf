"""Pairs: a rank's (token, slot) pairs in the order in which they are sent.

The one idea: sorted by expert they are sorted by node and rank too, since neighbouring experts live
together; so every split of a send buffer is a run of this one order. On the way back each row is
read from there by its place, and summed; nothing is laid out by token and slot.

Shapes: T tokens, K slots, P = T * K pairs, of which N are sent, E experts, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Pairs:
    """The kept pairs of expert_TK by (expert, token, slot)."""

    def __init__(self, expert_TK: Tensor, num_experts: int, kept_TK: Tensor | None) -> None:
        self.num_tokens, self.num_slots = expert_TK.shape
        expert_N = expert_TK.flatten()
        if kept_TK is not None:  # the dropped are sorted behind the last expert, and cut off
            expert_N = expert_N.masked_fill(~kept_TK.flatten(), num_experts)
        count_E = torch.bincount(expert_N, minlength=num_experts)
        self.count_E = count_E[:num_experts]
        self.order_N = expert_N.argsort(stable=True)
        """token * K + slot of each pair."""
        self._place_TK = inverse(self.order_N).view_as(expert_TK)
        """Of each pair in that order; of the dropped, one past the last."""
        self._has_dropped = kept_TK is not None
        if kept_TK is not None:
            self.order_N = self.order_N[: int(self.count_E.sum())]
            self._place_TK = self._place_TK.clamp(max=len(self.order_N))
        self.token_N = self.order_N // self.num_slots

    def sum_slots(self, x_ND: Tensor, weight_TK: Tensor | None = None) -> Tensor:
        """x_TD: each token's rows, times their weights if there are any, summed in slot order.

        A dropped pair adds 0. Autograd sees nothing of it.
        """
        if not x_ND.numel():
            return x_ND.new_zeros((self.num_tokens, x_ND.shape[-1]))
        return F.embedding_bag(
            self._place_TK, self._with_dropped(x_ND), mode="sum", per_sample_weights=weight_TK
        )

    def slot_products(self, x_TD: Tensor, y_ND: Tensor) -> Tensor:
        """p_TK: of each token's row with each of its pairs' rows; 0 for a dropped pair.

        With x the gradient of `sum_slots(y_ND, weight_TK)` it is that of the weights.
        """
        if not y_ND.numel():
            return x_TD.new_zeros(self._place_TK.shape)
        place_P = self._place_TK.flatten()
        pair_P = torch.arange(len(place_P), device=place_P.device)
        token_P, first_T = pair_P // self.num_slots, pair_P[:: self.num_slots]
        # what autograd calls behind embedding_bag, whose own backward wants to give y a gradient,
        # too, and takes far longer; the last 0 is mode="sum"
        product_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD, self._with_dropped(y_ND), place_P, first_T, token_P, 0
        )
        return product_P.view_as(self._place_TK)

    def _with_dropped(self, x_ND: Tensor) -> Tensor:
        return F.pad(x_ND, (0, 0, 0, 1)) if self._has_dropped else x_ND


def inverse(permutation_N: Tensor) -> Tensor:
    """The permutation that undoes it."""
    inverse_N = torch.empty_like(permutation_N)
    inverse_N[permutation_N] = torch.arange(len(permutation_N), device=permutation_N.device)
    return inverse_N


def grouping(keys: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """The stable permutation of rows by key; rows lie in blocks of one key and so many rows."""
    key_R = keys.flatten().repeat_interleave(counts.flatten(), output_size=num_rows)
    return key_R.argsort(stable=True)
