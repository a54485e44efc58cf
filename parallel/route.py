"""Pairs: a rank's (token, slot) pairs in the order in which they are sent.

The one idea: sorted by expert they are sorted by node and rank too, since neighbouring experts live
together; so every split of a send buffer is a run of this one order.

Shapes: T tokens, K slots, N pairs that are sent, E experts, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        if kept_TK is not None:
            self.order_N = self.order_N[: int(self.count_E.sum())]
        self.token_N = self.order_N // self.num_slots
        self._inverse_N = inverse(self.order_N) if kept_TK is None else None

    def by_slot(self, x_ND: Tensor) -> Tensor:
        """x_TKD: each pair's row at its token and slot; 0 where a pair was dropped."""
        if self._inverse_N is not None:
            x_PD = x_ND.index_select(0, self._inverse_N)
        else:
            x_PD = x_ND.new_zeros((self.num_tokens * self.num_slots, x_ND.shape[-1]))
            x_PD.index_copy_(0, self.order_N, x_ND)
        return x_PD.view(self.num_tokens, self.num_slots, x_ND.shape[-1])


def inverse(permutation_N: Tensor) -> Tensor:
    """The permutation that undoes it."""
    inverse_N = torch.empty_like(permutation_N)
    inverse_N[permutation_N] = torch.arange(len(permutation_N), device=permutation_N.device)
    return inverse_N


def grouping(keys: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """The stable permutation of rows by key; rows lie in blocks of one key and so many rows."""
    key_R = keys.flatten().repeat_interleave(counts.flatten(), output_size=num_rows)
    return key_R.argsort(stable=True)
