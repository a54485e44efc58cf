"""A RolloutSource without Ray: real engines on the real log, run when their batch is collected."""

from __future__ import annotations

from pathlib import Path

from gossamer.comm.engines.hf import HFEngine
from gossamer.comm.log import WeightLog
from gossamer.comm.rollout import Request, Sample


class LocalRollouts:
    """Engines in this process; units go round them in turn."""

    def __init__(self, run_dir: Path, model: dict, num_engines: int) -> None:
        self._log = WeightLog.open(run_dir / "log")
        ids = {"pad_id": model["pad_token_id"], "eos_id": model["eos_token_id"]}
        self._engines = [HFEngine(model, self._log, **ids) for _ in range(num_engines)]
        self._batches: dict[str, list[list[Request]]] = {}

    def submit(self, batch: str, units: list[list[Request]], oldest_version: int) -> None:
        self._batches[batch] = units

    def collect(self, batch: str) -> list[Sample]:
        samples: list[Sample] = []
        for number, unit in enumerate(self._batches.pop(batch)):
            engine = self._engines[number % len(self._engines)]
            self._follow(engine)
            samples += engine.generate(unit)
        return samples

    def audit(self, version: int) -> dict[str, str]:
        for engine in self._engines:
            self._follow(engine)
        return {f"engine-{i}": engine.audit() for i, engine in enumerate(self._engines)}

    def _follow(self, engine: HFEngine) -> None:
        while (version := self._log.next_version(engine.version)) is not None:
            engine.stage(version)
            engine.commit()
