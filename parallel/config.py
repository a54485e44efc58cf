"""How the ranks of one replica share the work."""

from __future__ import annotations

from dataclasses import dataclass

ZERO_STAGES = (0, 1, 2)
DTYPES = ("float32", "bfloat16")


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

    def __post_init__(self) -> None:
        for field in ("data", "expert", "reduce_bucket_elements"):
            if getattr(self, field) < 1:
                raise ValueError(f"parallel.{field} must be at least 1, got {getattr(self, field)}")
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
                " DeepSpeed keeps no float32 masters that we could publish"
            )

    @property
    def world_size(self) -> int:
        return self.data * self.expert
