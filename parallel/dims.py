"""ParallelDims: the mesh of one replica, checked once, with its process groups.

The one idea: expert parallelism is carved out of data parallelism. Every rank reads its own tokens;
`expert` neighbouring ranks hold one full set of experts between them; ranks that hold the same
experts ("expert data parallel", size `data`) average their gradients. Dense parameters are
replicated over the whole world.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from gossamer.parallel.config import DispatchConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelDims:
    """Sizes and this rank's place. rank = data_rank * expert + expert_rank."""

    data: int
    expert: int
    rank: int
    expert_group: dist.ProcessGroup | None
    """Ranks that share one set of experts, for the all-to-all of dispatch; None if expert=1."""
    dispatch: DispatchConfig = DispatchConfig()
    node_group: dist.ProcessGroup | None = None
    """Ranks of the expert group on this rank's node; None if it has one, or with one level."""
    rail_group: dist.ProcessGroup | None = None
    """Ranks of the expert group that have this rank's place on their nodes; None with one level or
    one node."""

    @property
    def world_size(self) -> int:
        return self.data * self.expert

    @property
    def expert_rank(self) -> int:
        return self.rank % self.expert

    @property
    def data_rank(self) -> int:
        return self.rank // self.expert

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one expert group on one node."""
        return min(self.dispatch.ranks_per_node or self.expert, self.expert)

    @property
    def num_nodes(self) -> int:
        """Nodes over which one expert group is spread."""
        return self.expert // self.ranks_per_node

    def local_experts(self, num_experts: int) -> range:
        """Logical ids of the experts that this rank holds.

        Raises ValueError when EP does not divide the experts.
        """
        if num_experts % self.expert:
            raise ValueError(
                f"parallel.expert={self.expert} does not divide the model's {num_experts} experts"
            )
        count = num_experts // self.expert
        return range(self.expert_rank * count, (self.expert_rank + 1) * count)


def build_dims(config: ParallelConfig) -> ParallelDims:
    """Checks the product against the world and makes the expert groups (a collective call)."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if config.world_size != world_size:
        raise ValueError(
            f"parallel.data={config.data} x parallel.expert={config.expert} ="
            f" {config.world_size} ranks, but the world has {world_size}"
        )
    expert, is_two_level = config.expert, config.dispatch.levels == 2
    per_node = min(config.dispatch.ranks_per_node or expert, expert)
    sets = range(0, world_size, expert)
    nodes = range(0, world_size, per_node)
    groups = [_own_group((range(s, s + expert) for s in sets), expert), None, None]
    if is_two_level and per_node < expert:
        groups[1] = _own_group((range(n, n + per_node) for n in nodes), per_node)
        rails = (range(s + i, s + expert, per_node) for s in sets for i in range(per_node))
        groups[2] = _own_group(rails, expert // per_node)
    return ParallelDims(
        data=config.data,
        expert=expert,
        rank=dist.get_rank() if dist.is_initialized() else 0,
        dispatch=config.dispatch,
        expert_group=groups[0],
        node_group=groups[1],
        rail_group=groups[2],
    )


def _own_group(parts: Iterable[range], size: int) -> dist.ProcessGroup | None:
    """Makes a group of each part, on all ranks in the same order; returns this rank's."""
    own = None
    for ranks in parts if size > 1 else ():
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            own = group
    return own
