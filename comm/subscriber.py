"""Follows a weight log onto live weights.

The one idea: the next thing to apply is the delta on what is live; where the chain is broken (a
first load, a writer that took over) it is the newest anchor, which goes on anything.
"""

from __future__ import annotations

from gossamer.comm.live import ApplyError, CommitStats, LiveWeights, Staged
from gossamer.comm.log import WeightLog


class Subscriber:
    """One follower; `fetched_bytes` counts the frames that it read."""

    def __init__(self, log: WeightLog, live: LiveWeights) -> None:
        self.fetched_bytes = 0
        self._log = log
        self._live = live

    def next_version(self) -> int | None:
        """The version to stage next to get nearer to the head; None when up to date."""
        return self._log.next_version(self._live.version)

    def fetch_and_stage(self, version: int) -> Staged:
        """Fetches a version's delta if it goes on what is live, else its anchor, and stages it.

        Raises ApplyError when it can do neither, LogError for a missing or damaged file.
        """
        manifest = self._log.manifest(version)
        goes_on = bool(manifest.delta) and manifest.base_version == self._live.version
        refs = manifest.delta if goes_on else manifest.anchor
        if not refs:
            raise ApplyError(
                f"version {version} goes on version {manifest.base_version} and holds no anchor, "
                f"but version {self._live.version} is live"
            )
        frames = [self._log.read_part(ref) for ref in refs]
        self.fetched_bytes += sum(map(len, frames))
        return self._live.stage(manifest, frames)

    def commit(self, staged: Staged) -> CommitStats:
        """Makes a staged version live."""
        return self._live.commit(staged)

    def catch_up(self) -> int:
        """Applies versions until the head is live; returns it. Raises LogError on an empty log."""
        while (version := self.next_version()) is not None:
            self.commit(self.fetch_and_stage(version))
        live = self._live.version
        return self._log.newest_anchor() if live is None else live
