"""What a run saves and puts back: its whole state as a checkpoint, and a session from one.

The one idea: `Progress`, the engine's rows, the routing biases and the data position are the whole
state; the rest is rebuilt from the config.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gossamer.comm.log import WeightLog
from gossamer.parallel.engine import Engine, Owned
from gossamer.trainer.checkpoint import (
    Checkpoint,
    list_checkpoints,
    prune_checkpoints,
    write_checkpoint,
)
from gossamer.trainer.config import CheckpointConfig
from gossamer.trainer.model import MoEModel
from gossamer.trainer.moe.diversify import diversified

CHECKPOINTS = "checkpoints"


@dataclass(slots=True)
class Progress:
    """Where the run stands."""

    step: int = 0
    """Optimizer updates done, skipped ones among them."""
    phase_index: int = 0
    phase_step: int = 0
    """Updates done in the current phase."""
    skips: int = 0
    """Updates skipped because the gradient was not finite."""
    phase_skips: int = 0
    """Those of the current phase, by which its learning rate is behind."""
    skips_in_row: int = 0
    """The last updates, as far as they were all skipped."""

    @property
    def lr_step(self) -> int:
        """Number of the next update in the phase's learning-rate curve."""
        return self.phase_step - self.phase_skips

    def advance(self, skipped: bool) -> None:
        """After an update."""
        self.step += 1
        self.phase_step += 1
        self.skips += skipped
        self.phase_skips += skipped
        self.skips_in_row = self.skips_in_row + 1 if skipped else 0

    def end_phase(self) -> None:
        self.phase_index += 1
        self.phase_step = self.phase_skips = 0


class Saver:
    """Saves and restores one rank of a run; every rank has one and makes the same calls."""

    def __init__(
        self,
        config: CheckpointConfig,
        run_dir: Path,
        epoch: int,
        engine: Engine,
        model: MoEModel,
        log: WeightLog,
    ) -> None:
        self._config, self._root, self._epoch = config, run_dir / CHECKPOINTS, epoch
        self._engine, self._model, self._log = engine, model, log

    def is_due(self, step: int) -> bool:
        return step % self._config.every_steps == 0

    def save(self, progress: Progress, data: dict[str, Any] | None, version: int | None) -> dict:
        """Writes the whole state; returns what the `checkpoint` event says.

        Raises RuntimeError, as a stale writer, when a later attempt has begun.
        """
        start_s = time.perf_counter()
        if self._log.is_superseded(self._epoch):
            raise RuntimeError(
                f"this is writer epoch {self._epoch} of the run, but a later one has begun;"
                " nothing was written"
            )
        state = {
            "progress": asdict(progress),
            "num_updates": self._engine.num_updates,
            "data": data,
            "log": {"version": version},
        }
        owned = chain(self._engine.owned(with_moments=True), self.buffers())
        _, num_bytes = write_checkpoint(self._root, progress.step, self._epoch, owned, state)
        if dist.get_rank() == 0:
            prune_checkpoints(self._root, self._config.keep_last)
        write_s = time.perf_counter() - start_s
        return {"step": progress.step, "version": version, "bytes": num_bytes, "write_s": write_s}

    def buffers(self) -> Iterator[Owned]:
        """Routing biases: alike on every rank, and the first rank's."""
        if dist.get_rank() == 0:
            for name, values in self._model.buffers().items():
                yield Owned(name, tuple(values.shape), 0, len(values), values, {})

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Puts engine, biases and RNG back. Raises ValueError for another model's checkpoint."""
        held = sum(math.prod(shape) for shape in checkpoint.shapes.values())
        buffers = self._model.buffers()
        expected = self._model.num_parameters()[0] + sum(b.numel() for b in buffers.values())
        if held != expected:
            raise ValueError(
                f"{checkpoint.folder} holds {held} parameters; expected {expected} as in the model"
            )
        self._engine.write(checkpoint.read, checkpoint.state["num_updates"])
        for name, values in buffers.items():
            values.copy_(checkpoint.read(name, 0, len(values)).master)
        if dist.get_rank() in checkpoint.rng:
            torch.set_rng_state(checkpoint.rng[dist.get_rank()])
        return Progress(**checkpoint.state["progress"])

    def diversify(self, masked_share: float, seed: int) -> None:
        """Copies the one expert trained so far to all, from the checkpoint just saved."""
        whole = Checkpoint(list_checkpoints(self._root)[-1])
        read = diversified(whole.read, masked_share, seed)
        self._engine.write(read, self._engine.num_updates)
