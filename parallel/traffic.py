"""Traffic: the bytes that dispatch and combine send from this rank, inside its node and across.

The one idea: counted where they are handed to the collective, from the very splits it is given;
what a rank keeps for itself is not traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Traffic:
    """Bytes sent by this rank to others, and (token, slot) pairs, since it was made."""

    forward_in_node: int = 0
    """Rows of hidden states of dispatch and combine; a recomputed forward pass counts again."""
    forward_across: int = 0
    backward_in_node: int = 0
    """Rows of gradients."""
    backward_across: int = 0
    index_in_node: int = 0
    """Counts and positions that tell the receiver what the rows are (forward only)."""
    index_across: int = 0
    pairs: int = 0
    """(token, slot) pairs that the router chose, padding not counted where it is known."""
    dropped: int = 0
    """Those of them that found no place."""

    def add(self, kind: str, link: str, num_bytes: int) -> None:
        """`kind`: forward, backward or index; `link`: in_node or across."""
        name = f"{kind}_{link}"
        setattr(self, name, getattr(self, name) + num_bytes)

    def take(self) -> Traffic:
        """What was counted; counting starts again from 0."""
        taken = Traffic(*(getattr(self, field.name) for field in fields(self)))
        for field in fields(self):
            setattr(self, field.name, 0)
        return taken


class Link:
    """A process group with the node of each of its ranks: an all-to-all that counts its bytes."""

    def __init__(
        self, group: dist.ProcessGroup | None, is_across: list[bool], traffic: Traffic
    ) -> None:
        """`is_across`: of each rank of the group, whether it is on another node."""
        self._group, self._is_across, self._traffic = group, is_across, traffic
        self._own = dist.get_rank(group) if group is not None else 0

    def exchange(self, x: Tensor, send: list[int], recv: list[int], kind: str) -> Tensor:
        """Rows of x to each rank by exact counts; returns the rows received, in rank order."""
        if self._group is None:
            return x
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        for rank, rows in enumerate(send):
            if rank != self._own and rows:
                link = "across" if self._is_across[rank] else "in_node"
                self._traffic.add(kind, link, rows * row_bytes)
        out = x.new_empty((sum(recv), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), recv, send, group=self._group)
        return out

    def exchange_evenly(self, x: Tensor) -> Tensor:
        """x[i] goes to rank i; kind `index`."""
        ones = [1] * len(x)
        return self.exchange(x, ones, ones, "index")
