"""One parameter group's flat training state: this rank's shard of it, as rows and back.

The one idea: a shard is a slice of one long vector, so whatever is held per element (masters,
moments, masks, any dtype) becomes rows of a logical tensor by the same few sends: only a band that
straddles the end of a shard moves at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from gossamer.parallel.flat_layout import FlatLayout, Run
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class StateGroup:
    """One parameter group: its layout, this rank's shard of it and the ranks that share it."""

    layout: FlatLayout
    offsets: dict[str, int]
    """First element of each of its parameters, by name; the same on every expert rank."""
    parameter: nn.Parameter
    """The flat master shard that the optimizer updates."""
    local_start: int
    local_stop: int
    partition: int
    process_group: dist.ProcessGroup | None
    is_replicated: bool
    """Stage 0: every rank of the group holds all of it."""

    def local(self, start: int, stop: int) -> slice:
        """What this rank's shard holds of flat elements [start, stop); empty where nothing."""
        low, high = max(start, self.local_start), min(stop, self.local_stop)
        return slice(low - self.local_start, max(low, high) - self.local_start)


def gather_run(state: StateGroup, run: Run, buffers: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The run's flat tensors on its owner, None elsewhere; moves pieces that lie elsewhere.

    `buffers`: this rank's shards, in the same order and dtypes on every rank. Collective.
    """
    mine = state.partition
    pieces = state.layout.pieces(run.start, run.stop)
    if state.is_replicated or len(pieces) == 1:
        local = state.local(run.start, run.stop)
        return {k: b[local] for k, b in buffers.items()} if run.owner == mine else None

    parts: list[list[Tensor]] = []
    for partition, start, stop in pieces:
        sizes = [(stop - start) * b.element_size() for b in buffers.values()]
        if partition == mine:
            local = state.local(start, stop)
            held = torch.cat([b[local].view(torch.uint8) for b in buffers.values()])
            if partition == run.owner:
                parts.append(list(held.split(sizes)))
            else:
                dist.send(held, group_dst=run.owner, group=state.process_group)
        elif mine == run.owner:
            received = torch.empty(sum(sizes), dtype=torch.uint8, device=state.parameter.device)
            dist.recv(received, group_src=partition, group=state.process_group)
            parts.append(list(received.split(sizes)))
    if mine != run.owner:
        return None
    return {
        key: torch.cat(same).view(buffer.dtype)
        for (key, buffer), same in zip(buffers.items(), zip(*parts, strict=True), strict=True)
    }


def spread_run(state: StateGroup, run: Run, values: Tensor | None, shard: Tensor) -> None:
    """The way back: the owner's flat `values` of a run go into every shard that holds part of it.

    `values` is None where this rank is not the owner. Collective.
    """
    mine = state.partition
    if state.is_replicated:
        target = shard[run.start : run.stop]
        if values is not None:
            target.copy_(values)
        if dist.get_world_size(state.process_group) > 1:
            dist.broadcast(target.view(torch.uint8), group_src=run.owner, group=state.process_group)
        return
    for partition, start, stop in state.layout.pieces(run.start, run.stop):
        local = state.local(start, stop)
        if values is not None:
            piece = values[start - run.start : stop - run.start]
            if partition == mine:
                shard[local] = piece
            else:
                sent = piece.contiguous().view(torch.uint8)
                dist.send(sent, group_dst=partition, group=state.process_group)
        elif partition == mine:
            received = torch.empty_like(shard[local])
            dist.recv(received.view(torch.uint8), group_src=run.owner, group=state.process_group)
            shard[local] = received
