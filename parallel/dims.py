"""ParallelDims: the mesh of one replica, checked once, with its process groups.

The one idea: expert parallelism is carved out of data parallelism. Every rank reads its own tokens;
`expert` neighbouring ranks hold one full set of experts between them; ranks that hold the same
experts ("expert data parallel", size `data`) average their gradients. Dense parameters are
replicated over the whole world.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from gossamer.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelDims:
    """Sizes and this rank's place. rank = data_rank * expert + expert_rank."""

    data: int
    expert: int
    rank: int
    expert_group: dist.ProcessGroup | None
    """Ranks that share one set of experts, for the all-to-all of dispatch; None if expert=1."""

    @property
    def world_size(self) -> int:
        return self.data * self.expert

    @property
    def expert_rank(self) -> int:
        return self.rank % self.expert

    @property
    def data_rank(self) -> int:
        return self.rank // self.expert

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
    rank = dist.get_rank() if dist.is_initialized() else 0
    expert_group = None
    if config.expert > 1:
        for data_rank in range(config.data):
            ranks = range(data_rank * config.expert, (data_rank + 1) * config.expert)
            group = dist.new_group(list(ranks))
            if rank in ranks:
                expert_group = group
    return ParallelDims(
        data=config.data, expert=config.expert, rank=rank, expert_group=expert_group
    )
