"""The engine of a run's model.

The one idea: what a model tells of itself (module, blocks, segments) and what a config tells of the
optimizer meet here alone, so that a run and the tests beside it train by the same engine.
"""

from __future__ import annotations

from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.deepspeed_engine import DeepSpeedEngine
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.model import MoEModel
from gossamer.trainer.optim import build_adamw, decays
from gossamer.trainer.step.config import OptimConfig


def build_engine(
    model: MoEModel, dims: ParallelDims, parallel: ParallelConfig, optim: OptimConfig
) -> DeepSpeedEngine:
    """DeepSpeed's engine over the model, AdamW on its masters; a collective call."""
    return DeepSpeedEngine(
        model.module,
        model.blocks,
        model.segments,
        dims,
        parallel,
        lambda groups: build_adamw(groups, optim),
        decays,
    )
