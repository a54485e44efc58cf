"""One rank of an engine that follows a log: stages in a thread, commits when told, takes it back.

The one idea: fetching, decoding and proving a version happens beside the running engine, so that
what is left for its pause is to write the changed places; and until every rank has written them,
each can put the old ones back. Audits run in the same thread, on tensors that serving only reads.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from gossamer.comm.engines.images import bind
from gossamer.comm.engines.layout import learn
from gossamer.comm.engines.pieces import LayoutError, Runtime, Spec
from gossamer.comm.live import ApplyError, CommitStats, LiveWeights, Staged
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError
from gossamer.comm.reader import read_head
from gossamer.comm.subscriber import AuditError, Subscriber


class RankFollower:
    """Follows `log` onto `runtime`. For one caller at a time; raises LayoutError, LogError."""

    def __init__(self, log: WeightLog, runtime: Runtime, audit_every_versions: int = 0) -> None:
        specs = checkpoint_specs(log)
        layout = learn(specs, runtime)
        missing = [name for name in layout.untouched if _is_weight(runtime.tensors[name])]
        if missing:
            raise LayoutError(f"the log at {log.url} holds nothing for the weight {missing[0]}")
        self._tensors, self._mirrors = bind(specs, layout, runtime)
        self._runtime, self._addresses = runtime, runtime.addresses()
        self._live = LiveWeights(self._tensors, self._mirrors)
        self._subscriber = Subscriber(log, self._live)
        self._audit_every = audit_every_versions
        self._unaudited = 0
        self._thread = ThreadPoolExecutor(1, "gossamer")
        self._staging: tuple[int, Future[Staged]] | None = None
        self._audit: Future[str] | None = None
        self._can_roll_back = False
        self._run_id = log.run_id
        self._last = {"fetched_bytes": 0, "num_changed": 0, "stage_s": 0.0, "commit_s": 0.0}

    @property
    def version(self) -> int | None:
        """The live version, None before the first commit."""
        return self._live.version

    def stage(self, version: int) -> None:
        """Begins to stage `version`, unless it was begun. From then on there is no way back."""
        if self._staging is None or self._staging[0] != version or _failure(self._staging[1]):
            self._can_roll_back = False
            self._staging = version, self._thread.submit(self._fetch_and_stage, version)

    def commit(self, version: int) -> CommitStats:
        """Makes `version` live once it is staged. Raises what staging raised, or ApplyError."""
        self.stage(version)
        assert self._staging is not None
        (_, staging), before = self._staging, self.version
        try:
            staged = staging.result()
            self._runtime.check_addresses(self._addresses)
            stats = self._subscriber.commit(staged)
        finally:
            self._staging = None
        self._can_roll_back = before is not None and self.version != before
        self._last.update(commit_s=stats.pause_s, num_changed=stats.num_changed)
        if self._audit and _failure(self._audit):
            self._audit = None  # healed
        return stats

    def roll_back(self) -> None:
        """Puts the version before the last commit back, unless that was a first load."""
        self._staging = None
        if self._can_roll_back:
            self._can_roll_back = False
            self._live.rollback()

    def finish(self) -> None:
        """Says that every rank has committed; begins an audit when one is due."""
        self._can_roll_back = False
        self._unaudited += 1
        if 0 < self._audit_every <= self._unaudited:
            self._audit, self._unaudited = self._thread.submit(self._audit_live), 0

    def audit(self) -> str:
        """State hash of what the engine computes with, read in full."""
        return self._thread.submit(self._live.audit).result()

    def status(self) -> dict[str, Any]:
        """What a driver asks for, JSON; byte counts and seconds are of the last version."""
        version, staging = self._staging or (None, None)
        failure = staging and _failure(staging)
        return {
            "run_id": self._run_id,
            "version": self.version,
            "staged": version if staging and staging.done() and not failure else None,
            "failure": failure,
            "is_unsound": staging is not None and _is_unsound(staging),
            "audit_failure": self._audit and _failure(self._audit),
            "image_bytes": sum(self._tensors[name].nbytes for name in self._mirrors),
            **self._last,
        }

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _fetch_and_stage(self, version: int) -> Staged:
        start_s, before = time.perf_counter(), self._subscriber.fetched_bytes
        try:
            staged = self._subscriber.fetch_and_stage(version)
        except LogError:
            with suppress(LogError, OSError):
                self._subscriber.next_version()  # forgets what was missing, if all else is as well
            raise
        self._last["stage_s"] = time.perf_counter() - start_s
        self._last["fetched_bytes"] = self._subscriber.fetched_bytes - before
        return staged

    def _audit_live(self) -> str:
        """An audit; after one that fails no version counts as live, and an anchor heals."""
        try:
            return self._subscriber.audit()
        except AuditError:
            self._live.version = None
            raise


def checkpoint_specs(log: WeightLog) -> dict[str, Spec]:
    """The tensors of the log, from the heads of its newest anchor. Raises LogError."""
    heads = [read_head(log, ref) for ref in log.manifest(log.newest_anchor()).anchor]
    return {
        run.name: Spec(run.shape, getattr(torch, run.dtype)) for head in heads for run in head.runs
    }


def _is_weight(tensor: torch.Tensor) -> bool:
    """True for a matrix that is no buffer and was not dropped."""
    return isinstance(tensor, torch.nn.Parameter) and tensor.ndim > 1 and tensor.numel() > 0


def _is_unsound(future: Future[Any]) -> bool:
    """True for frames that cannot be used, so that other ones may do; a store may be back soon."""
    return future.done() and isinstance(future.exception(), (LogError, ApplyError))


def _failure(future: Future[Any]) -> str | None:
    error = future.exception() if future.done() else None
    return f"{type(error).__name__}: {error}" if error else None
