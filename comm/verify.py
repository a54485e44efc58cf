"""Checks a whole log: every link of its chain, every frame and sum; with a replay every bit.

The one idea: nothing is believed for where it lies. A manifest names its parent's file by hash and
its parts by digest, and its state hash is what its base's and the parts' gains add up to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError, Manifest, PartRef, total_bytes
from gossamer.comm.reader import StateReader, read_frame
from gossamer.comm.state_hash import MASK_64
from gossamer.comm.subscriber import AuditError, Subscriber


@dataclass(slots=True)
class Verdict:
    """What was checked, and what is wrong with it."""

    versions: int
    folds: int
    nbytes: int = 0
    faults: list[str] = field(default_factory=list)


def verify(
    log: WeightLog,
    replay: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Reads the whole log; with `replay` also applies it, which holds the model in memory once.

    `on_progress(done, total)` counts versions and folds.
    """
    versions, folds = log.versions(), log.folds()
    verdict = Verdict(len(versions), len(folds))
    checks = [partial(_check_version, log, version) for version in versions]
    checks += [partial(_check_fold, log, first, last) for first, last in folds]
    if versions and versions[-1] - versions[0] >= len(versions):
        verdict.faults.append(f"not all versions from {versions[0]} to {versions[-1]} are there")
    total = len(checks) + (len(versions) if replay else 0)
    for done, check in enumerate(checks, 1):
        try:
            verdict.nbytes += check()
        except LogError as error:
            verdict.faults.append(str(error))
        on_progress(done, total)
    if replay and versions and not verdict.faults:
        try:
            _replay(log, versions, lambda done: on_progress(len(checks) + done, total))
        except (LogError, ApplyError, AuditError) as error:
            verdict.faults.append(str(error))
    return verdict


def _check_version(log: WeightLog, version: int) -> int:
    """Bytes of the version's frames. Raises LogError."""
    manifest = log.manifest(version)
    if version and log.is_committed(version - 1):
        parent = (version - 1, log.manifest(version - 1).state_hash, log.manifest_hash(version - 1))
        found = (manifest.parent_version, manifest.parent_state_hash, manifest.parent_hash)
        if found != parent:
            raise LogError(f"version {version} names {found} as its parent; expected {parent}")
        if manifest.delta and (manifest.base_version, manifest.base_state_hash) != parent[:2]:
            raise LogError(f"the delta of version {version} does not go on its parent")
    _check_frames(log, manifest, "delta", manifest.delta)
    _check_frames(log, manifest, "anchor", manifest.anchor)
    return total_bytes(manifest.delta) + total_bytes(manifest.anchor)


def _check_fold(log: WeightLog, first: int, last: int) -> int:
    fold = log.fold(first, last)
    if log.is_committed(last) and fold.state_hash != log.manifest(last).state_hash:
        raise LogError(
            f"the fold from {first} to {last} leads to another state than version {last}"
        )
    _check_frames(log, fold, "delta", fold.delta)
    return total_bytes(fold.delta)


def _check_frames(log: WeightLog, manifest: Manifest, kind: str, refs: list[PartRef]) -> None:
    """Raises LogError unless the parts are whole, of this version, and add up to its hash."""
    version = manifest.version
    base = (manifest.base_version, manifest.base_state_hash) if kind == "delta" else (None, None)
    state = int(base[1] or "0", 16)
    for part, ref in enumerate(refs):
        frame = read_frame(log, ref)
        found = (frame.kind, frame.version, frame.step, frame.part, frame.num_parts)
        expected = (kind, version, manifest.step, part, len(refs))
        if found != expected or (frame.base_version, frame.base_state_hash) != base:
            raise LogError(
                f"{ref.name} is (kind, version, step, part, num_parts) = {found} on version "
                f"{frame.base_version}; expected {expected} on version {base[0]}"
            )
        state += frame.hash_gain
    if refs and f"{state & MASK_64:016x}" != manifest.state_hash:
        raise LogError(
            f"the {kind} parts of version {version} add up to state hash {state & MASK_64:016x}; "
            f"its manifest says {manifest.state_hash}"
        )


def _replay(log: WeightLog, versions: list[int], on_version: Callable[[int], None]) -> None:
    """Applies every version from the oldest anchor on, and decodes every anchor by itself.

    Raises LogError, ApplyError or AuditError.
    """
    anchors = [version for version in versions if log.manifest(version).anchor]
    live = LiveWeights(
        {name: torch.zeros_like(tensor) for name, tensor in StateReader(log, anchors[0])}
    )
    subscriber = Subscriber(log, live)
    for done, version in enumerate(versions, 1):
        if version >= anchors[0]:
            subscriber.commit(subscriber.fetch_and_stage(version))
        if version in anchors[1:]:
            for _ in StateReader(log, version):
                pass  # raises where the anchor is not its version
        on_version(done)
    subscriber.audit()
