"""Moves what is held per expert between ranks, by one all-to-all.

The one idea: a tensor keeps its name and changes its place. From where all ranks held each name and
where they are to hold it, every rank works out the same list of copies between flat shards; so
whatever lies in a shard of that layout (masters, moments, masks, buffers of error feedback) goes
along as one more tensor of the list, of any dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.flat_layout import Segment
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Copy:
    """`count` elements from `start` of rank `source`'s shards to `target_start` of `target`'s.

    Ranks are the world's; expert rank r of the d-th set of experts is rank d * EP + r.
    """

    source: int
    start: int
    target: int
    target_start: int
    count: int


def copies(
    before: Sequence[Sequence[Segment]],
    after: Sequence[Sequence[Segment]],
    dims: ParallelDims,
    shard_elements: int | None,
) -> Iterator[Copy]:
    """All copies that bring tensors from where they lie to where they are to lie, in name order.

    `before` and `after` hold the segments of each expert rank's flat buffer; the ranks that hold
    the same experts share it in shards of `shard_elements`, or each holds all of it (None). What
    every rank holds stays. Raises ValueError when a name is lost, is new or changes its size.
    """
    source_of, target_of = _places(before), _places(after)
    for name in sorted(source_of.keys() | target_of.keys()):
        source, target = source_of.get(name), target_of.get(name)
        if source is None or target is None or source[2] != target[2]:
            raise ValueError(f"{name} is at {source} and is to be at {target}: expected one tensor")
        if source == target:
            continue
        (source_rank, start, count), (target_rank, target_start, _) = source, target
        if shard_elements is None:
            for first in range(0, dims.world_size, dims.expert):
                yield Copy(first + source_rank, start, first + target_rank, target_start, count)
            continue
        while count:  # up to the next cut, here or there
            (shard, at), (target_shard, to) = (
                divmod(x, shard_elements) for x in (start, target_start)
            )
            step = min(count, shard_elements - at, shard_elements - to)
            yield Copy(
                shard * dims.expert + source_rank,
                at,
                target_shard * dims.expert + target_rank,
                to,
                step,
            )
            start, target_start, count = start + step, target_start + step, count - step


def _places(buffers: Sequence[Sequence[Segment]]) -> dict[str, tuple[int, int, int]]:
    """Name -> (expert rank, first element, elements)."""
    return {
        segment.name: (rank, segment.start, segment.stop - segment.start)
        for rank, segments in enumerate(buffers)
        for segment in segments
    }


def exchange(work: Sequence[tuple[Copy, Sequence[Tensor]]]) -> int:
    """Makes all copies by one all-to-all over the world; returns the bytes sent to other ranks.

    `work`: the same copies in the same order on every rank, each with this rank's flat shards that
    it is about, in the same order and dtypes. Holds what travels twice for a while.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    outgoing: list[list[Tensor]] = [[] for _ in range(world_size)]
    incoming = [0] * world_size
    for copy, shards in work:
        for shard in shards:
            if copy.source == rank:
                piece = shard[copy.start : copy.start + copy.count]
                outgoing[copy.target].append(piece.view(torch.uint8))
            if copy.target == rank:
                incoming[copy.source] += copy.count * shard.element_size()
    sent = [sum(map(len, pieces)) for pieces in outgoing]
    device = work[0][1][0].device if work else "cpu"
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
    packed = torch.cat([received[:0], *(piece for pieces in outgoing for piece in pieces)])
    dist.all_to_all_single(received, packed, incoming, sent)
    at = [0, *accumulate(incoming)]
    for copy, shards in work:
        for shard in shards if copy.target == rank else ():
            stop = at[copy.source] + copy.count * shard.element_size()
            # a clone starts where any dtype may
            piece = received[at[copy.source] : stop].clone().view(shard.dtype)
            shard[copy.target_start : copy.target_start + copy.count] = piece
            at[copy.source] = stop
    return sum(sent) - sent[rank]
