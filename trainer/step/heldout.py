"""Loss on held-out text, every so many steps.

The one idea: the rows are drawn once, when the run starts, and every rank holds them all; so each
look is at the same text, and nothing of it has to be saved.
"""

from __future__ import annotations

import time
from typing import Any

from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.config import PhaseConfig, TrainConfig
from gossamer.trainer.evaluate import heldout_loss
from gossamer.trainer.feed import Feed
from gossamer.trainer.model import MoEModel


class HeldoutText:
    """The rows of config.heldout for each kind of phase that reads text."""

    def __init__(self, config: TrainConfig, feed: Feed) -> None:
        """A collective call. Raises ValueError on rank 0 when no document is held out."""
        heldout, self._micro_rows = config.heldout, config.micro_rows
        self._every_steps = heldout.every_steps
        kinds = {phase.kind for phase in config.phases} - {"grpo"} if heldout.every_steps else set()
        try:
            self._rows = {kind: feed.heldout(kind) for kind in sorted(kinds)}
        except ValueError as error:
            raise ValueError(
                f"heldout.permille is {heldout.permille}: {error}; expected a share that holds out"
                " at least one document"
            ) from error

    def measure(
        self, model: MoEModel, dims: ParallelDims, phase: PhaseConfig, step: int
    ) -> dict[str, Any] | None:
        """What the `eval` event says after optimizer step `step`; None when it is not due."""
        rows = self._rows.get(phase.kind)
        if rows is None or step % self._every_steps:
            return None
        start_s = time.perf_counter()
        loss, tokens = heldout_loss(model, dims, rows, self._micro_rows)
        return {
            "name": "text",
            "step": step,
            "phase": phase.name,
            "loss": loss,
            "tokens": tokens,
            "eval_s": time.perf_counter() - start_s,
        }
