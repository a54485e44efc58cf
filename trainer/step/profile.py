"""Torch's profiler over a few steps, on request: a Chrome trace for each rank.

The one idea: switched on by step numbers, so that what is looked at has warmed up.
"""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile


class StepProfiler:
    """Watches optimizer steps first to last (from 1); does nothing without them."""

    def __init__(self, folder: Path, rank: int, steps: tuple[int, int] | None) -> None:
        self._path = folder / f"rank{rank}.json"
        self._first, self._last = steps or (0, 0)
        self._profile: profile | None = None

    def begin_step(self, step: int) -> None:
        if self._first <= step <= self._last and self._profile is None:
            self._profile = profile()
            self._profile.start()

    def end_step(self, step: int) -> None:
        """Writes the trace after the last step."""
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Writes the trace of what was watched so far, if anything is being watched."""
        if self._profile is not None:
            self._profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
