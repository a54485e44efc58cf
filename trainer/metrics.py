"""Numbers of a run: one JSON line an event in RUN_DIR/metrics.jsonl, and wandb beside it.

The one idea: the file is the truth, appended with one write a line so that several processes may
share it; displays, reports and summaries read nothing else. For a run at a URL the segments of
trainer/event_store.py are that file.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from gossamer.comm.store import open_store
from gossamer.trainer.config import MetricsConfig
from gossamer.trainer.event_store import FOLDER, StoreLines
from gossamer.trainer.run_folder import url_of, where_of

METRICS_FILE, WANDB_FILE = "metrics.jsonl", "wandb_id"


class EventLog:
    """Adds events to a run's metrics; safe for several processes of one host, at a URL of many."""

    def __init__(self, run_dir: Path) -> None:
        self._store = StoreLines(url) if (url := url_of(run_dir)) is not None else None
        self._path = run_dir / METRICS_FILE
        if self._store is None:
            run_dir.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(self._path, flags, 0o644)

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """One line: event, time_s (unix) and the fields, which must be JSON.

        Raises OSError that names the file when the line does not fit on the disk whole.
        """
        record = {"event": event, "time_s": round(time.time(), 4), **fields}
        line = (json.dumps(record) + "\n").encode()
        if self._store is not None:
            return self._store.add(line)
        if self._is_torn():
            line = b"\n" + line  # else it would be lost with what a full disk or a kill cut short
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def _is_torn(self) -> bool:
        size = os.fstat(self._descriptor).st_size
        return size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def flush(self) -> None:
        """Returns once all that was written can be read. Raises StoreError."""
        if self._store is not None:
            self._store.flush()


def has_events(run_dir: Path) -> bool:
    """Whether any process of the run wrote there."""
    if (url := url_of(run_dir)) is not None:
        return bool(open_store(url).list(FOLDER))
    return (run_dir / METRICS_FILE).is_file()


def drop_torn_lines(run_dir: Path) -> None:
    """Takes out lines that a full disk or a power cut tore. Call before anything appends."""
    if url_of(run_dir) is not None:
        return  # a store tears none
    path = run_dir / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if _is_whole(line)]
    if len(whole) < len(lines):
        temporary = path.with_name(f".{path.name}")
        temporary.write_bytes(b"".join(whole))
        temporary.replace(path)


def _is_whole(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


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
            id=_wandb_id(run_dir),
            resume="allow",  # each attempt goes on with the same one
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


def _wandb_id(run_dir: Path) -> str:
    """Of the run: the first attempt leaves it in the run's folder."""
    store = open_store(where_of(run_dir))
    store.put(WANDB_FILE, secrets.token_hex(8).encode())  # stays what it is where it is there
    return store.get(WANDB_FILE).decode()
