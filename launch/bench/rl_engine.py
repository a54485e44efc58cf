"""What `gossamer bench rl` puts into its runs: an engine that says when it first used a version.

The one idea: the time is taken inside the engine's own turn at the weights, so it belongs to that
version for sure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.comm.engines.hf import HFEngine
from gossamer.comm.log import WeightLog
from gossamer.trainer.metrics import EventLog
from gossamer.trainer.task import Problem
from torch import Tensor
from transformers import DynamicCache


class TimedEngine(HFEngine):
    """HFEngine that writes a `first_token` event when logits of a new version are there."""

    def __init__(
        self, model_config: dict[str, Any], log: WeightLog, *, pad_id: int, eos_id: int
    ) -> None:
        super().__init__(model_config, log, pad_id=pad_id, eos_id=eos_id)
        self._events, self._used = EventLog(Path(log.url).parent), -1

    def _forward(self, ids_BP: Tensor, mask_BP: Tensor, cache: DynamicCache) -> Tensor:
        logits_BV = super()._forward(ids_BP, mask_BP, cache)
        version = self.version
        if version is not None and version > self._used:
            self._used = version
            self._events.write("first_token", {"version": version})
        return logits_BV


def any_difference(completion: str, problem: Problem, finished: bool) -> float:
    """Random models are never right: a reward that differs from sample to sample instead."""
    return sum(completion.encode()) % 7 / 7.0
