"""How the ranks of one replica share the work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gossamer.parallel.placement.config import PlacementConfig

ZERO_STAGES = (0, 1, 2)
DTYPES = ("float32", "bfloat16")
DISPATCH_LEVELS = (1, 2)
DROP_POLICIES = ("position", "probability", "random")


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """How tokens travel to their experts, and which of them may not."""

    levels: int = 1
    """1 = one all-to-all over the expert-parallel ranks; 2 = across nodes, then inside the node: a
    token crosses to a node once, however many of its experts live there. Same bits either way."""

    ranks_per_node: int | None = None
    """Neighbouring ranks that share a node; None = all. Bytes are counted by it."""

    capacity_factor: float | None = None
    """An expert takes at most this many times its even share of a rank's (token, slot) pairs from
    that rank; the others are dropped. None = dropless."""

    drop_policy: str = "position"
    """Who keeps a place: `position` = the first tokens, `probability` = the largest combine
    weights, `random` = drawn anew at each step and layer (random token selection)."""

    drop_seed: int = 0
    """Of the policy `random`."""

    def __post_init__(self) -> None:
        where = "parallel.dispatch"
        if self.levels not in DISPATCH_LEVELS:
            raise ValueError(f"{where}.levels must be one of {DISPATCH_LEVELS}, got {self.levels}")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ValueError(f"{where}.ranks_per_node must be at least 1 or null")
        if self.levels == 2 and self.ranks_per_node is None:
            raise ValueError(f"{where}.levels=2 needs {where}.ranks_per_node")
        factor = self.capacity_factor
        if factor is not None and not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{where}.capacity_factor must be a positive number or null")
        if self.drop_policy not in DROP_POLICIES:
            raise ValueError(f"{where}.drop_policy must be one of {DROP_POLICIES}")
        if self.drop_seed < 0:
            raise ValueError(f"{where}.drop_seed must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of the mesh of one replica and the DeepSpeed settings that belong to it."""

    data: int = 1
    """Expert-data-parallel size: how many ranks hold the same experts. World = data x expert."""

    expert: int = 1
    """Expert-parallel size (EP): over how many ranks the experts of a layer are spread."""

    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 = all state on every rank, 1 = optimizer state sharded, 2 = and
    gradients."""

    compute_dtype: str = "float32"
    """dtype of forward and backward; optimizer masters are always at least float32."""

    reduce_bucket_elements: int = 50_000_000
    """Elements per gradient-reduction bucket."""

    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    """How tokens travel to their experts."""

    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which rank holds which experts."""

    def __post_init__(self) -> None:
        for name in ("data", "expert", "reduce_bucket_elements"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if self.zero_stage == 3:
            raise ValueError(
                "parallel.zero_stage=3 is refused: DeepSpeed does not support ZeRO-3 with expert"
                " parameters; use 0, 1 or 2"
            )
        if self.zero_stage not in ZERO_STAGES:
            raise ValueError(f"parallel.zero_stage must be one of {ZERO_STAGES}")
        if self.compute_dtype not in DTYPES:
            raise ValueError(f"parallel.compute_dtype must be one of {DTYPES}")
        if self.compute_dtype != "float32" and self.zero_stage == 0:
            raise ValueError(
                f"parallel.compute_dtype={self.compute_dtype} needs zero_stage 1 or 2: at stage 0"
                " DeepSpeed's Adam takes a step without gradients before the first"
            )
        if self.expert == 1 and not self.placement.is_contiguous:
            raise ValueError("parallel.placement needs parallel.expert above 1: one rank holds all")
        per_node = self.dispatch.ranks_per_node
        if per_node is not None and self.expert % per_node and per_node % self.expert:
            raise ValueError(
                f"parallel.dispatch.ranks_per_node={per_node} and parallel.expert={self.expert}:"
                " expected one to divide the other"
            )

    @property
    def world_size(self) -> int:
        return self.data * self.expert
