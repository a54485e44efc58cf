"""Folds many deltas into one, for readers that lag.

The one idea: a fold is the delta between two states, made as a trainer would have made it had it
published nothing in between; a weight that moved ten times, or there and back, is coded once or not
at all. It stands beside the deltas, under a name of its own, and no reader depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gossamer.comm.codec.part import PartEncoder, Rows
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import (
    LogError,
    PartRef,
    fold_name,
    fold_part_name,
    pack_manifest,
    total_bytes,
)
from gossamer.comm.reader import StateReader
from gossamer.comm.state_hash import format_hash
from gossamer.comm.wire import Frame, frame_digest, pack_frame

if TYPE_CHECKING:
    from gossamer.comm.signing import Signer


@dataclass(frozen=True, slots=True)
class Folded:
    """What was written."""

    name: str
    nbytes: int
    delta_bytes: int
    """Of the deltas that it stands for."""


def fold(
    log: WeightLog,
    first: int,
    last: int,
    signer: Signer | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Folded:
    """Writes the delta from version `first` to version `last`.

    Holds the model in memory once, beside the frames that lead to either version.
    `on_progress(done, total)` counts tensors. Raises LogError when a version is missing, or the
    fold exists.
    """
    if last - first < 2:
        raise ValueError(f"a fold spans at least two versions, not {first} to {last}")
    base, target, name = log.manifest(first), log.manifest(last), fold_name(first, last)
    before, after = StateReader(log, first), StateReader(log, last)
    total = len(before) + len(after)
    encoder = PartEncoder()
    encoder.move_base(encoder.encode(_rows(before, on_progress, 0, total), False, False))
    part = encoder.encode(_rows(after, on_progress, len(before), total), True, False)
    if format_hash(int(base.state_hash, 16) + part.delta_gain) != target.state_hash:
        raise LogError(f"versions {first} and {last} are not what their state hashes say")
    frame = Frame(
        kind="delta",
        run_id=log.run_id,
        version=last,
        base_version=first,
        base_state_hash=base.state_hash,
        step=target.step,
        writer_epoch=target.writer_epoch,
        part=0,
        num_parts=1,
        num_changed=part.num_changed,
        hash_gain=part.delta_gain,
        runs=part.delta,
    )
    data = pack_frame(frame, signer.sign if signer else None)
    digest = frame_digest(data)
    ref = PartRef(fold_part_name(first, last, digest), len(data), digest)
    manifest = replace(
        target,
        parent_version=first,
        parent_state_hash=base.state_hash,
        parent_hash=log.manifest_hash(first),
        base_version=first,
        base_state_hash=base.state_hash,
        delta=[ref],
        anchor=[],
        num_changed=part.num_changed,
        created_s=time.time(),
    )
    log.store.put(ref.name, data)
    if not log.store.put(name, pack_manifest(manifest, signer)):
        raise LogError(f"{name} exists already")
    deltas = sum(total_bytes(log.manifest(v).delta) for v in range(first + 1, last + 1))
    return Folded(name, len(data), deltas)


def _rows(
    state: StateReader, on_progress: Callable[[int, int], None], done: int, total: int
) -> Iterator[Rows]:
    for name, tensor in state:
        yield Rows(name, tuple(tensor.shape), 0, tensor)
        done += 1
        on_progress(done, total)
