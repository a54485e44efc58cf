"""Which expert lives where, in training: from a file at the start, and anew every so many steps.

The one idea: routing, losses, counts and names are logical; a placement is one table from logical
to physical experts in each MoE block, and the names of the rows each rank holds. Changing both
between two steps, and moving the rows, changes no bit of what is learned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import Engine, LogicalSegments
from gossamer.parallel.placement.placement import Placement, contiguous, load_placement
from gossamer.trainer.model import MoEModel, logical_segments
from gossamer.trainer.moe.block import MoEBlock
from gossamer.trainer.moe.trace import LAYER


class PlacedExperts:
    """The experts of a model, and where they live now: where they were built, at first."""

    def __init__(self, model: MoEModel, engine: Engine, dims: ParallelDims) -> None:
        self._model, self._engine, self._dims = model, engine, dims
        self._blocks = dict(_blocks(model))
        self.placement = contiguous(sorted(self._blocks), model.blocks[0].num_experts, dims.expert)

    @property
    def blocks(self) -> list[MoEBlock]:
        """In layer order, as the placement's rows."""
        return [self._blocks[number][1] for number in self.placement.layers]

    def place(self, placement: Placement) -> dict[str, float]:
        """Moves experts, with all that is held of them, to where `placement` has them.

        Between two steps; a collective call. Returns bytes (sent by all ranks), busiest_bytes (by
        the one that sent most), move_s and moved_experts. Raises ValueError, with nothing moved,
        for a placement of another model or EP.
        """
        self._refuse_other_model(placement, "the placement")
        start_s = time.perf_counter()
        before, after = self._segments(self.placement), self._segments(placement)
        sent = torch.tensor(self._engine.move(before, after))
        for number, slots_E in zip(placement.layers, placement.slots_LS, strict=True):
            block = self._blocks[number][1]
            device = block.experts.down_proj.device
            block.physical_E = torch.tensor(slots_E, device=device).argsort()
        moved_experts, self.placement = self.placement.moved(placement), placement
        busiest = sent.clone()
        dist.all_reduce(sent)
        dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
        return {
            "moved_experts": moved_experts,
            "bytes": int(sent),
            "busiest_bytes": int(busiest),
            "move_s": time.perf_counter() - start_s,
        }

    def place_file(self, path: Path) -> dict[str, float]:
        """As `place`, of a file that `gossamer place` wrote; errors name it."""
        if not path.is_file():
            raise FileNotFoundError(
                f"parallel.placement.path={path} is no file; expected one of `gossamer place`"
            )
        placement = load_placement(path)
        self._refuse_other_model(placement, str(path))
        return self.place(placement)

    def _refuse_other_model(self, placement: Placement, what: str) -> None:
        for name in ("layers", "experts", "ranks"):
            found, expected = getattr(placement, name), getattr(self.placement, name)
            if found != expected:
                raise ValueError(f"{what} has {name} {found}; expected {expected} as in the model")

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
