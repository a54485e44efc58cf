"""Which expert lives where, in training: from a file at the start, and anew every so many steps.

The one idea: routing, losses, counts and names are logical; a placement is one table from logical
to physical experts in each MoE block, and the names of the rows each rank holds. Changing both
between two steps, and moving the rows, changes no bit of what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import Engine, LogicalSegments
from gossamer.parallel.placement.placement import Placement, contiguous
from gossamer.trainer.model import MoEModel, logical_segments
from gossamer.trainer.moe.block import MoEBlock

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class PlacedExperts:
    """The experts of a model, and where they live now: where they were built, at first."""

    def __init__(self, model: MoEModel, engine: Engine, dims: ParallelDims) -> None:
        self._model, self._engine, self._dims = model, engine, dims
        self._blocks = dict(_blocks(model))
        self.placement = contiguous(sorted(self._blocks), model.blocks[0].num_experts, dims.expert)

    def place(self, placement: Placement) -> int:
        """Moves experts, with all that is held of them, to where `placement` has them.

        Between two steps; a collective call. Returns the bytes that this rank sent to others.
        Raises ValueError, with nothing moved, for a placement of another model or EP.
        """
        for name in ("layers", "experts", "ranks"):
            found, expected = getattr(placement, name), getattr(self.placement, name)
            if found != expected:
                raise ValueError(f"the placement has {name} {found}; expected {expected}")
        before, after = self._segments(self.placement), self._segments(placement)
        num_bytes = self._engine.move(before, after)
        for number, slots_E in zip(placement.layers, placement.slots_LS, strict=True):
            block = self._blocks[number][1]
            device = block.experts.down_proj.device
            block.physical_E = torch.tensor(slots_E, device=device).argsort()
        self.placement = placement
        return num_bytes

    def _segments(self, placement: Placement) -> list[LogicalSegments]:
        """Of each expert rank."""
        share, found = placement.slots_per_rank, []
        for first in range(0, placement.experts, share):
            held = zip(placement.layers, placement.slots_LS[:, first : first + share], strict=True)
            placed = {f"{self._blocks[n][0]}.experts": slots.tolist() for n, slots in held}
            model_type = self._model.config.model_type
            found.append(logical_segments(self._model.module, 0, model_type, placed))
        return found


def _blocks(model: MoEModel) -> Iterator[tuple[int, tuple[str, MoEBlock]]]:
    """Layer number -> (name, block)."""
    for name, block in model.module.named_modules():
        if isinstance(block, MoEBlock):
            number = LAYER.search(f"{name}.")
            assert number, name
            yield int(number[1]), (name, block)
