"""Publishes one part of each version of the weights.

The one idea: parts talk through the store alone. Each puts its frame, part 0 commits the version
when all frames are there, and a part's base moves only when it sees the manifest: a delta is
always against what every reader can hold, whoever is killed when.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gossamer.comm.codec.part import EncodedPart, PartEncoder, Rows
from gossamer.comm.committer import Committer
from gossamer.comm.config import LogConfig
from gossamer.comm.log import StaleWriterError, WeightLog
from gossamer.comm.manifest import Manifest, PartRef, manifest_name, part_name, total_bytes
from gossamer.comm.wire import Frame, frame_digest, pack_frame
from torch import Tensor

if TYPE_CHECKING:
    from gossamer.comm.signing import Signer


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
    export_s: float
    """Waiting for `rows`: gathering and rounding are the caller's."""
    find_s: float
    """Finding and hashing changes; where an anchor is due, coding it."""
    encode_s: float
    """Coding changes, framing and signing."""
    put_s: float
    """Writing the frames."""
    wait_s: float
    """Waiting for the other parts, committing or seeing the manifest."""
    bytes_by_codec: dict[str, int]
    runs_by_choice: dict[tuple[str, str], int]
    """Runs of the delta by (codec, why it was chosen)."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """This part's frames, put under one version's names."""

    version: int
    step: int
    rewind_to_step: int | None
    frames: dict[str, bytes]
    refs: dict[str, PartRef]


class Publisher:
    """Part `part` of `num_parts`; all parts of a version share its writer epoch and its step.

    `writer_epoch` is one `log.claim_epoch()` for all parts; a publisher without others may leave it
    out and claims it itself, if need be with `takeover`. With a `signer` frames and manifests are
    signed.
    """

    def __init__(
        self,
        log: WeightLog,
        part: int = 0,
        num_parts: int = 1,
        writer_epoch: int | None = None,
        config: LogConfig | None = None,
        signer: Signer | None = None,
        takeover: bool = False,
    ) -> None:
        if not 0 <= part < num_parts:
            raise ValueError(f"part must be from 0 to {num_parts - 1}, not {part}")
        if writer_epoch is None:
            if num_parts > 1:
                raise ValueError(f"writer_epoch must be given, the same to all {num_parts} parts")
            writer_epoch = log.claim_epoch(takeover)
        self._log = log
        self._part = part
        self._num_parts = num_parts
        self._epoch = writer_epoch
        self._config = config or LogConfig()
        self._signer = signer
        self._committer = Committer(log, num_parts, writer_epoch, signer)
        self._encoder = PartEncoder(
            self._config.zstd_level, self._config.link_mbit, self._config.num_threads
        )
        self._last: Manifest | None = None
        self._last_anchor = 0
        self._bytes_since_anchor = 0

    def publish(
        self,
        weights: Mapping[str, Tensor] | Iterable[Rows],
        step: int,
        rewind_to_step: int | None = None,
    ) -> Published:
        """Publishes this part of the next version; returns when the version is committed.

        `weights` are whole tensors by name, in the dtypes that readers are to hold, or this part's
        rows. Raises StaleWriterError when another writer took the log, PartTimeoutError when a part
        or the manifest stays away, ValueError for rows that are not those of the last version.
        A version that was put but not committed stays open: publish the same again, or go on with
        a new writer epoch.
        """
        rows = _Timed(_rows_of(weights) if isinstance(weights, Mapping) else weights)
        clock = _Clock()
        if self._last is None:
            head = self._log.head()
            version = 0 if head is None else head + 1
        else:
            version = self._last.version + 1
        kinds = self._kinds(version)
        part = self._encoder.encode(rows, "delta" in kinds, "anchor" in kinds)
        frames = self._pack(part, kinds, version, step)
        encode_s = clock.lap_s() - part.find_s
        put_s = wait_s = 0.0
        while True:
            attempt = _Attempt(version, step, rewind_to_step, frames, self._put(frames, version))
            put_s += clock.lap_s()
            manifest = self._settle(attempt)
            wait_s += clock.lap_s()
            if manifest is not None:
                break
            # a writer that this one supersedes was quicker; an anchor goes on any base
            version += 1
            frames = self._pack(part, kinds, version, step)
            encode_s += clock.lap_s()
        self._encoder.move_base(part)
        self._move(manifest)
        return Published(
            version=version,
            step=step,
            kind=kinds[0],
            frame_bytes=len(frames[kinds[0]]),
            anchor_bytes=len(frames["anchor"]) if len(frames) == 2 else 0,
            full_bytes=part.full_bytes,
            num_changed=part.num_changed,
            num_elements=part.num_elements,
            export_s=rows.elapsed_s,
            find_s=part.find_s - rows.elapsed_s,
            encode_s=encode_s,
            put_s=put_s,
            wait_s=wait_s,
            bytes_by_codec=dict(part.bytes_by_codec),
            runs_by_choice=dict(part.runs_by_choice),
        )

    def start_over(self) -> None:
        """Makes the next version an anchor alone: for when rows have moved between parts.

        A collective call: all parts of a version start over together.
        """
        self._encoder.forget()
        self._last = None

    def _kinds(self, version: int) -> list[str]:
        """Every part comes to the same answer: from the config and from manifests alone."""
        if self._last is None:
            return ["anchor"]
        limit = self._config.anchor_every_bytes
        is_due = version - self._last_anchor >= self._config.anchor_every_versions
        is_due = is_due or 0 < limit <= self._bytes_since_anchor
        return ["delta", "anchor"] if is_due else ["delta"]

    def _move(self, manifest: Manifest) -> None:
        self._last = manifest
        self._bytes_since_anchor += total_bytes(manifest.delta)
        if manifest.anchor:
            self._last_anchor, self._bytes_since_anchor = manifest.version, 0

    def _pack(
        self, part: EncodedPart, kinds: list[str], version: int, step: int
    ) -> dict[str, bytes]:
        """This part's frames by kind."""
        frames = {}
        for kind in kinds:
            is_delta, base = kind == "delta", self._last
            frame = Frame(
                kind=kind,
                run_id=self._log.run_id,
                version=version,
                base_version=base.version if base and is_delta else None,
                base_state_hash=base.state_hash if base and is_delta else None,
                step=step,
                writer_epoch=self._epoch,
                part=self._part,
                num_parts=self._num_parts,
                num_changed=part.num_changed if is_delta else part.num_elements,
                hash_gain=part.delta_gain if is_delta else part.anchor_gain,
                runs=part.delta if is_delta else part.anchor,
            )
            frames[kind] = pack_frame(frame, self._signer.sign if self._signer else None)
        return frames

    def _put(self, frames: dict[str, bytes], version: int) -> dict[str, PartRef]:
        refs = {}
        for kind, data in frames.items():
            name = part_name(version, self._epoch, self._part, kind)
            # the same bytes are those of a call that failed later on, and is made again
            if not self._log.store.put(name, data) and self._log.store.get(name) != data:
                raise StaleWriterError(
                    f"{name} exists already: writer epoch {self._epoch} left version {version} "
                    "open with other weights, go on with a new one"
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
                self._committer.commit(
                    version, attempt.step, attempt.rewind_to_step, self._last, attempt.frames
                )
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


class _Clock:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._at_s = time.perf_counter()

    def lap_s(self) -> float:
        before_s, self._at_s = self._at_s, time.perf_counter()
        return self._at_s - before_s


class _Timed:
    """Rows, and how long they were waited for."""

    def __init__(self, rows: Iterable[Rows]) -> None:
        self.elapsed_s = 0.0
        self._rows = rows

    def __iter__(self) -> Iterator[Rows]:
        clock = _Clock()
        for each in self._rows:
            self.elapsed_s += clock.lap_s()
            yield each
            clock.lap_s()
        self.elapsed_s += clock.lap_s()


def _rows_of(tensors: Mapping[str, Tensor]) -> Iterator[Rows]:
    for name, tensor in tensors.items():
        yield Rows(name, tuple(tensor.shape), 0, tensor.detach().cpu().contiguous())
