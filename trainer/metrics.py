"""Numbers of a run: one JSON line an event in RUN_DIR/metrics.jsonl, and wandb beside it.

The one idea: the file is the truth, appended with one write a line so that several processes may
share it; displays, reports and summaries read nothing else.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from gossamer.trainer.config import MetricsConfig

METRICS_FILE = "metrics.jsonl"


class EventLog:
    """Appends events to a run's metrics file; safe for several processes on one host."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(run_dir / METRICS_FILE, flags, 0o644)

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """One line: event, time_s (unix) and the fields, which must be JSON."""
        record = {"event": event, "time_s": round(time.time(), 4), **fields}
        os.write(self._descriptor, (json.dumps(record) + "\n").encode())


class WandbMirror:
    """Mirrors numeric fields of events to wandb; does nothing when wandb_mode is disabled."""

    def __init__(self, run_dir: Path, name: str, config: MetricsConfig, settings: dict) -> None:
        self._run = None
        if config.wandb_mode == "disabled":
            return
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=name,
            dir=run_dir,
            mode=config.wandb_mode,  # type: ignore[arg-type]
            config=settings,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    def write(self, event: str, step: int, fields: dict[str, Any]) -> None:
        """Numbers of one event under event/field."""
        if self._run is not None:
            numbers = {k: v for k, v in fields.items() if isinstance(v, int | float)}
            self._run.log({f"{event}/{k}": v for k, v in numbers.items()}, step=step)

    def close(self) -> None:
        """Flushes and ends the wandb run."""
        if self._run is not None:
            self._run.finish()
