"""Follows a weight log onto live weights.

The one idea: whatever leads from what is live to the head by the fewest bytes is applied next: a
delta, a fold over several, or an anchor, which goes on anything.
"""

from __future__ import annotations

from gossamer.comm.live import ApplyError, CommitStats, LiveWeights, Staged
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import GoneError, LogError, Manifest


class AuditError(RuntimeError):
    """Live tensors that are not what the log says they are."""


class Subscriber:
    """One follower; `fetched_bytes` counts the frames that it read.

    With `audit_every_versions` K the live tensors are hashed in full after every K-th commit.
    """

    def __init__(self, log: WeightLog, live: LiveWeights, audit_every_versions: int = 0) -> None:
        self.fetched_bytes = 0
        self._log = log
        self._live = live
        self._audit_every = audit_every_versions
        self._unaudited = 0
        self._committed: Manifest | None = None

    def next_version(self) -> int | None:
        """The version to stage next to get nearer to the head; None when up to date."""
        return self._log.next_version(self._live.version)

    def fetch_and_stage(self, version: int) -> Staged:
        """Fetches the frames that make `version` of what is live, and stages them.

        Raises ApplyError when there are none, GoneError for a file deleted meanwhile (ask
        `next_version` again), LogError for a damaged one.
        """
        if version == self._live.version:
            return self._live.stage(self._log.manifest(version), [])  # nothing to do
        hop = self._log.hop(self._live.version, version)
        if hop is None:
            base = self._log.manifest(version).base_version
            raise ApplyError(
                f"version {version} goes on version {base} and holds no anchor, "
                f"but version {self._live.version} is live"
            )
        try:
            frames = [self._log.read_part(ref) for ref in hop.refs]
            self.fetched_bytes += sum(map(len, frames))
            return self._live.stage(hop.manifest, frames)
        except (ApplyError, LogError):
            if hop.kind == "fold":  # nobody needs one
                self._log.avoid(hop.refs)
            raise

    def commit(self, staged: Staged) -> CommitStats:
        """Makes a staged version live. Raises AuditError when an audit is due and fails."""
        stats = self._live.commit(staged)
        self._committed = staged.manifest
        self._unaudited += 1
        if 0 < self._audit_every <= self._unaudited:
            self.audit()
        return stats

    def audit(self) -> str:
        """State hash of the live tensors, read in full. Raises AuditError unless the log has it."""
        version = self._live.version
        if version is None:
            raise AuditError("no version is live: expected a commit before an audit")
        self._unaudited = 0
        known = self._committed
        if known is None or known.version != version:
            known = self._log.manifest(version)
        found, expected = self._live.audit(), known.state_hash
        if found != expected:
            raise AuditError(
                f"the live tensors hash to {found} where version {version} has {expected}; "
                f"other than committed: {', '.join(self._live.differing()) or 'none'}"
            )
        return found

    def catch_up(self) -> int:
        """Applies versions until the head is live; returns it. Raises LogError on an empty log."""
        while (version := self.next_version()) is not None:
            try:
                self.commit(self.fetch_and_stage(version))
            except GoneError:
                continue  # the next look finds another way, or says that there is none
        live = self._live.version
        return self._log.newest_anchor() if live is None else live
