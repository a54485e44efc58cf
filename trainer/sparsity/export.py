"""A sparse run's checkpoint as plain dense tensors, and its masks in a file beside them.

The one idea: whoever loads a folder needs to know nothing of masks: weights are what the forward
pass saw, zeros and all, under the usual names. The masks lie in a folder of their own, where no
loader looks for weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gossamer.trainer.checkpoint import MASK, Checkpoint
from gossamer.trainer.sparsity.bits import pack_rows
from safetensors.torch import save_file
from torch import Tensor

MASKS_FILE = "sparsity/masks.safetensors"


class SparseCheckpoint:
    """A checkpoint as the forward pass sees it; of a run without masks, as it is."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._alive = checkpoint.state.get("sparsity", {}).get("alive", {})

    def weight(self, name: str) -> Tensor:
        """The whole tensor in float32."""
        master = self._checkpoint.rows(name, 0, self._checkpoint.shapes[name][0])
        mask = self._mask(name)
        if mask is None:
            return master
        # as Flow.forward has it: no -0.0 for a negative weight, no NaN for one that is not finite
        share = self._alive.get(name)
        return torch.where(mask, master, master * share if share else 0.0)

    def write_masks(self, folder: Path) -> None:
        """Writes sparsity/masks.safetensors: uint8 [rows, ceil(columns / 8)] by name, the first
        column the highest bit, 1 = kept; columns are in its metadata. No file without a zero."""
        packed, columns = {}, {}
        for name, shape in self._checkpoint.shapes.items():
            mask = self._mask(name)
            if mask is not None and not mask.all():
                packed[name], columns[name] = pack_rows(mask), str(shape[1])
        if not packed:
            return
        path = folder / MASKS_FILE
        path.parent.mkdir(exist_ok=True)
        save_file(packed, path.with_name(".masks"), metadata=columns)
        path.with_name(".masks").replace(path)

    def _mask(self, name: str) -> Tensor | None:
        if not self._checkpoint.has(name, MASK):
            return None
        return self._checkpoint.rows(name, 0, self._checkpoint.shapes[name][0], MASK)
