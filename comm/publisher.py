"""Publishes one part of each version of the weights.

The one idea: parts talk through the store alone. Each puts its frame, part 0 commits the version
when all frames are there, and a part's base moves only when it sees the manifest: a delta is
always against what every reader can hold, whoever is killed when.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from gossamer.comm.codec.part import EncodedPart, PartEncoder, Rows
from gossamer.comm.config import LogConfig
from gossamer.comm.log import (
    LogError,
    Manifest,
    PartRef,
    StaleWriterError,
    WeightLog,
    manifest_name,
    part_name,
)
from gossamer.comm.state_hash import TensorHash, add_runs, state_hash
from gossamer.comm.wire import (
    DTYPE_BYTES,
    KINDS,
    Frame,
    Run,
    WireError,
    frame_digest,
    pack_frame,
    uncovered,
    unpack_frame,
)


class PartTimeoutError(TimeoutError):
    """Another part, or the committer, did not come in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What one part of one version cost."""

    version: int
    step: int
    kind: str
    """`delta`, or `anchor` where the version has no delta."""
    frame_bytes: int
    """Of the frame that followers read: the delta where there is one."""
    anchor_bytes: int
    """Of an anchor beside the delta; else 0."""
    full_bytes: int
    """Of this part's rows in their publish dtypes."""
    num_changed: int
    num_elements: int
    encode_s: float
    """Finding changes, hashing, coding and framing."""
    commit_s: float
    """Writing the frames, waiting for the other parts, committing or seeing the manifest."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """This part's frames, put under one version's names."""

    version: int
    step: int
    rewind_to_step: int | None
    frames: dict[str, bytes]
    refs: dict[str, PartRef]


class Publisher:
    """Part `part` of `num_parts`; all parts of a version share its writer epoch and its step."""

    def __init__(
        self, log: WeightLog, part: int, num_parts: int, writer_epoch: int, config: LogConfig
    ) -> None:
        if not 0 <= part < num_parts:
            raise ValueError(f"part must be from 0 to {num_parts - 1}, not {part}")
        self._log = log
        self._part = part
        self._num_parts = num_parts
        self._epoch = writer_epoch
        self._config = config
        self._encoder = PartEncoder(config.zstd_level)
        self._last: Manifest | None = None
        self._last_anchor = 0
        # kept by part 0 alone: what each tensor hashes to in the last version
        self._hashes: dict[str, TensorHash] = {}

    def publish(
        self, rows: Iterable[Rows], step: int, rewind_to_step: int | None = None
    ) -> Published:
        """Publishes this part of the next version; returns when the version is committed.

        Raises StaleWriterError when another writer took the log, PartTimeoutError when a part
        or the manifest stays away, ValueError for rows that are not those of the last version.
        A version that was put but not committed stays open: go on with a new writer epoch.
        """
        started_s = time.perf_counter()
        if self._last is None:
            head = self._log.head()
            version = 0 if head is None else head + 1
            with_anchor = True
        else:
            version = self._last.version + 1
            with_anchor = version - self._last_anchor >= self._config.anchor_every_versions
        with_delta = self._last is not None
        part = self._encoder.encode(rows, with_delta, with_anchor)
        kinds = ["delta"] * with_delta + ["anchor"] * with_anchor
        frames = self._pack(part, kinds, version, step)
        encoded_s = time.perf_counter()
        while True:
            attempt = _Attempt(version, step, rewind_to_step, frames, self._put(frames, version))
            manifest = self._settle(attempt)
            if manifest is not None:
                break
            # a writer that this one supersedes was quicker; an anchor goes on any base
            version += 1
            frames = self._pack(part, kinds, version, step)
        self._encoder.move_base(part)
        self._last = manifest
        self._last_anchor = version if manifest.anchor else self._last_anchor
        kind = kinds[0]
        return Published(
            version=version,
            step=step,
            kind=kind,
            frame_bytes=len(frames[kind]),
            anchor_bytes=len(frames["anchor"]) if len(frames) == 2 else 0,
            full_bytes=part.full_bytes,
            num_changed=part.num_changed,
            num_elements=part.num_elements,
            encode_s=encoded_s - started_s,
            commit_s=time.perf_counter() - encoded_s,
        )

    def _pack(
        self, part: EncodedPart, kinds: list[str], version: int, step: int
    ) -> dict[str, bytes]:
        """This part's frames by kind."""
        return {
            kind: pack_frame(
                Frame(
                    kind=kind,
                    run_id=self._log.run_id,
                    version=version,
                    base_version=version - 1 if kind == "delta" else None,
                    step=step,
                    writer_epoch=self._epoch,
                    part=self._part,
                    num_parts=self._num_parts,
                    num_changed=part.num_changed if kind == "delta" else part.num_elements,
                    runs=part.delta if kind == "delta" else part.anchor,
                )
            )
            for kind in kinds
        }

    def _put(self, frames: dict[str, bytes], version: int) -> dict[str, PartRef]:
        refs = {}
        for kind, data in frames.items():
            name = part_name(version, self._epoch, self._part, kind)
            if not self._log.store.put(name, data):
                raise StaleWriterError(
                    f"{name} exists already: writer epoch {self._epoch} left version {version} "
                    "open, go on with a new one"
                )
            refs[kind] = PartRef(name, len(data), frame_digest(data))
        return refs

    def _settle(self, attempt: _Attempt) -> Manifest | None:
        """The manifest with this part in it; None where a superseded writer took the version."""
        version = attempt.version
        if self._part == 0:
            self._wait_for(
                [
                    part_name(version, self._epoch, part, kind)
                    for kind in attempt.frames
                    for part in range(1, self._num_parts)
                ],
                version,
            )
            if self._log.is_superseded(self._epoch):
                raise StaleWriterError(
                    f"writer epoch {self._epoch} cannot commit version {version}: "
                    "a newer writer claimed the log"
                )
            if not self._log.is_committed(version):
                self._commit(attempt)
        else:
            self._wait_for([manifest_name(version)], version)
        manifest = self._log.manifest(version)
        if set(attempt.refs.values()) <= {*manifest.delta, *manifest.anchor}:
            return manifest
        if manifest.writer_epoch < self._epoch and self._last is None:
            return None
        raise StaleWriterError(
            f"version {version} was committed by writer epoch {manifest.writer_epoch}, "
            f"without part {self._part} of writer epoch {self._epoch}"
        )

    def _wait_for(self, names: list[str], version: int) -> None:
        """Returns once all files are there, or someone has committed the version."""
        deadline_s = time.monotonic() + self._config.part_timeout_s
        while True:
            names = [name for name in names if self._log.store.size(name) is None]
            if not names or self._log.is_committed(version):
                return
            if time.monotonic() > deadline_s:
                raise PartTimeoutError(
                    f"part {self._part} waited {self._config.part_timeout_s} s "
                    f"for {', '.join(names)}"
                )
            time.sleep(self._config.poll_s)

    def _commit(self, attempt: _Attempt) -> None:
        """Commits the version from the tables of all parts, unless another writer did."""
        refs: dict[str, list[PartRef]] = {kind: [] for kind in KINDS}
        runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
        num_changed = {kind: 0 for kind in KINDS}
        for kind in attempt.frames:
            for part in range(self._num_parts):
                frame, ref = self._read_frame(attempt, part, kind)
                refs[kind].append(ref)
                runs[kind] += frame.runs
                num_changed[kind] += frame.num_changed
        gap = uncovered(runs["anchor"])
        if gap:
            raise LogError(f"the parts of version {attempt.version} do not add up: {gap}")
        base = self._last
        hashes = add_runs(self._hashes, runs["delta" if base else "anchor"])
        sizes = [(math.prod(each.shape), DTYPE_BYTES[each.dtype]) for each in hashes.values()]
        manifest = Manifest(
            run_id=self._log.run_id,
            version=attempt.version,
            step=attempt.step,
            writer_epoch=self._epoch,
            base_version=base.version if base else None,
            base_state_hash=base.state_hash if base else None,
            state_hash=state_hash(hashes),
            rewind_to_step=attempt.rewind_to_step,
            delta=refs["delta"],
            anchor=refs["anchor"],
            num_tensors=len(hashes),
            num_changed=num_changed["delta" if base else "anchor"],
            num_elements=sum(elements for elements, _ in sizes),
            full_bytes=sum(elements * itemsize for elements, itemsize in sizes),
            created_s=time.time(),
        )
        if self._log.commit(manifest):
            self._hashes = hashes

    def _read_frame(self, attempt: _Attempt, part: int, kind: str) -> tuple[Frame, PartRef]:
        """Another part's frame, or this one's, checked to be of this version and step."""
        name = part_name(attempt.version, self._epoch, part, kind)
        own = part == self._part
        data = attempt.frames[kind] if own else self._log.store.get(name)
        try:
            frame = unpack_frame(data)
        except WireError as error:
            raise LogError(f"{name} is {error}") from error
        expected = (kind, self._log.run_id, attempt.version, attempt.step, part, self._num_parts)
        found = (
            frame.kind,
            frame.run_id,
            frame.version,
            frame.step,
            frame.part,
            frame.num_parts,
        )
        if found != expected:
            raise LogError(
                f"{name} is (kind, run_id, version, step, part, num_parts) = {found}, "
                f"expected {expected}"
            )
        return frame, PartRef(name, len(data), frame_digest(data))
