"""Deletes what no reader needs any more.

The one idea: what is kept is everything from one anchor on, the floor, so every way from a kept
anchor to a kept version stays whole. Manifests below the floor go first, and their parts only when
the grace is over: a reader that planned before can finish, and one that comes too late misses a
file, never a change.

gc.json holds {"floors": [[floor, since]]}, Unix time: since when manifests below are gone.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import (
    FOLD_PART,
    PART,
    GoneError,
    fold_name,
    manifest_name,
    numbers_in,
)


@dataclass(frozen=True, slots=True)
class Swept:
    """What one pass deleted."""

    floor: int
    """The oldest version that is kept, an anchor."""
    manifests: int
    parts: int
    waiting: int
    """Parts below the floor that a later pass deletes, once the grace is over."""


def gc(
    log: WeightLog,
    keep_versions: int,
    keep_anchors: int = 1,
    grace_s: float = 3600.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Swept | None:
    """Keeps the newest `keep_versions` versions and `keep_anchors` anchors, and all between.

    Deletes older manifests, the parts of those that an earlier pass deleted at least `grace_s` ago,
    and parts that were put but never committed. None for an empty log. May be killed anywhere and
    run again. `on_progress(done, total)` counts manifests, then parts.
    """
    if min(keep_versions, keep_anchors) < 1 or grace_s < 0:
        raise ValueError(
            f"keep_versions and keep_anchors must be at least 1 and grace_s not negative, "
            f"not {keep_versions}, {keep_anchors} and {grace_s}"
        )
    head = log.head()
    if head is None:
        return None
    floor = _floor(log, head, keep_versions, keep_anchors)
    # oldest first: a pass that is killed leaves no hole
    stale = [manifest_name(version) for version in log.versions() if version < floor]
    stale += [fold_name(first, last) for first, last in log.folds() if last < floor]
    _delete(log, stale, on_progress)
    swept_to = _swept_to(log, floor, grace_s)
    parts, waiting = _dead_parts(log, head, floor, swept_to)
    _delete(log, parts, on_progress)
    return Swept(floor, len(stale), len(parts), waiting)


def _delete(log: WeightLog, names: list[str], on_progress: Callable[[int, int], None]) -> None:
    for done, name in enumerate(names, 1):
        log.store.delete(name)
        on_progress(done, len(names))


def _floor(log: WeightLog, head: int, keep_versions: int, keep_anchors: int) -> int:
    """The newest anchor that leaves enough versions and anchors; else the oldest version."""
    anchors = 0
    for version in range(head, -1, -1):
        try:
            anchors += bool(log.manifest(version).anchor)
        except GoneError:
            return version + 1
        is_enough = head - version + 1 >= keep_versions and anchors >= keep_anchors
        if is_enough and log.manifest(version).anchor:
            return version
    return 0


def _swept_to(log: WeightLog, floor: int, grace_s: float) -> int:
    """Notes that manifests below `floor` are gone; returns the floor whose grace is over."""
    try:
        floors = {int(at): float(s) for at, s in json.loads(log.store.get("gc.json"))["floors"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        floors = {}
    now_s = time.time()
    # never beyond what is kept now, whatever the file says
    floors = {at: since_s for at, since_s in floors.items() if at <= floor}
    floors.setdefault(floor, now_s)
    over = max((at for at, since_s in floors.items() if now_s - since_s >= grace_s), default=0)
    kept = sorted((at, since_s) for at, since_s in floors.items() if at >= over)
    log.store.put("gc.json", json.dumps({"floors": kept}).encode(), overwrite=True)
    return over


def _dead_parts(log: WeightLog, head: int, floor: int, swept_to: int) -> tuple[list[str], int]:
    """Parts that nobody can need, and how many more there will be when the grace is over."""
    dead, waiting = [], 0
    writers: dict[int, dict[str, int]] = defaultdict(dict)
    for name in log.store.list("parts/"):
        epoch = None
        if part := numbers_in(name, PART):
            version, epoch = part
        elif fold := numbers_in(name, FOLD_PART):
            _, version = fold
        else:
            continue
        if version < swept_to:
            dead.append(name)
        elif version < floor:
            waiting += 1
        elif epoch is not None and version <= head:
            writers[version][name] = epoch
    for version, epochs in writers.items():
        if len(set(epochs.values())) > 1:
            # one writer's parts were committed, and no other's can be any more
            manifest = log.manifest(version)
            named = {ref.name for ref in (*manifest.delta, *manifest.anchor)}
            dead += [name for name in epochs if name not in named]
    return dead, waiting
