"""Applies versions to live tensors in two steps: stage beside the running engine, then commit.

The one idea: staging reads the live (old) values, decodes and proves what the new state will hash
to, and touches nothing; committing only writes the changed places and remembers what was there,
so that a failure half-way puts every bit back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from gossamer.comm.codec.bits import dtype_name, tensor_bits
from gossamer.comm.codec.runs import RunCodec
from gossamer.comm.log import Manifest
from gossamer.comm.state_hash import (
    TensorHash,
    add_runs,
    hash_change,
    hash_elements,
    state_hash,
)
from gossamer.comm.wire import Frame, Run, WireError, frame_digest, uncovered, unpack_frame


class ApplyError(RuntimeError):
    """A version that does not go on these tensors; they are as they were."""


@dataclass(frozen=True, slots=True)
class Change:
    """New bit patterns for elements [start, stop) of a tensor, or those at `positions` in it."""

    name: str
    start: int
    stop: int
    positions: np.ndarray | None
    patterns: np.ndarray


@dataclass(frozen=True, slots=True)
class Staged:
    """A verified version, decoded against one live state."""

    manifest: Manifest
    live_version: int | None
    """The live version that it was decoded against."""
    hashes: dict[str, TensorHash]
    """Of the live tensors once committed."""
    changes: list[Change]
    num_changed: int


@dataclass(frozen=True, slots=True)
class CommitStats:
    """What a commit did."""

    version: int
    pause_s: float
    """Time in which the live tensors were written."""
    num_changed: int
    """Elements written: the changed ones, or whole runs where an anchor changes most of them."""


class LiveWeights:
    """The live tensors of one engine, by logical name: contiguous CPU views on its storage."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.version: int | None = None
        self._run_id: str | None = None
        self._state_hash: str | None = None
        self.tensors = tensors
        self._hashes = {
            name: TensorHash(dtype_name(tensor.dtype), tuple(tensor.shape), 0)
            for name, tensor in tensors.items()
        }
        for name in tensors:
            self._bits(name)

    def stage(self, manifest: Manifest, frames: list[bytes]) -> Staged:
        """Decodes and verifies a version against the live values; changes nothing.

        `frames` are the manifest's delta parts, or its anchor parts, in its order. Raises
        ApplyError: wrong base, wrong tensors, a damaged frame, another state hash.
        """
        if self._run_id not in (None, manifest.run_id):
            raise ApplyError(f"the live weights are of run {self._run_id}, not {manifest.run_id}")
        if (manifest.version, manifest.state_hash) == (self.version, self._state_hash):
            return Staged(manifest, self.version, self._hashes, [], 0)
        try:
            parts = [_unpack(manifest, data) for data in frames]
            kind = self._check_frames(manifest, parts, frames)
            runs = [run for part in parts for run in part.runs]
            for run in runs:
                self._check_fits(run)
            if kind == "anchor":
                self._check_covers(runs)
            changes = []
            codec = RunCodec()
            for run in runs:
                changes.append(self._decode(codec, run, kind))
        except WireError as error:
            raise ApplyError(f"version {manifest.version}: {error}") from error
        empty = {name: each._replace(sum=0) for name, each in self._hashes.items()}
        hashes = add_runs(empty if kind == "anchor" else self._hashes, runs)
        if state_hash(hashes) != manifest.state_hash:
            raise ApplyError(
                f"version {manifest.version} would leave state hash {state_hash(hashes)[:12]} "
                f"where its manifest says {manifest.state_hash[:12]}"
            )
        num_changed = sum(len(change.patterns) for change in changes)
        return Staged(manifest, self.version, hashes, changes, num_changed)

    def commit(self, staged: Staged) -> CommitStats:
        """Makes a staged version live, in place; on any failure puts back every bit and re-raises.

        The version that is live already is left as it is. Raises ApplyError when another version
        became live since staging.
        """
        manifest = staged.manifest
        if (manifest.version, manifest.state_hash) == (self.version, self._state_hash):
            return CommitStats(manifest.version, 0.0, 0)
        if staged.live_version != self.version:
            raise ApplyError(
                f"version {manifest.version} was staged on version {staged.live_version}, "
                f"but version {self.version} is live"
            )
        started_s = time.perf_counter()
        undo: list[tuple[np.ndarray, np.ndarray | slice, np.ndarray]] = []
        try:
            for change in staged.changes:
                live = self._bits(change.name)[change.start : change.stop]
                where = slice(None) if change.positions is None else change.positions
                undo.append((live, where, live[where].copy()))
                live[where] = change.patterns
        except BaseException:
            for live, where, patterns in reversed(undo):
                live[where] = patterns
            raise
        self.version, self._state_hash = manifest.version, manifest.state_hash
        self._run_id, self._hashes = manifest.run_id, staged.hashes
        return CommitStats(manifest.version, time.perf_counter() - started_s, staged.num_changed)

    def audit(self) -> str:
        """State hash of the live tensors, read in full."""
        return state_hash(
            {
                name: each._replace(sum=hash_elements(self._bits(name)))
                for name, each in self._hashes.items()
            }
        )

    def _bits(self, name: str) -> np.ndarray:
        """Flat bit patterns of a live tensor, which must still be what it was."""
        tensor, known = self.tensors[name], self._hashes[name]
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != known[:2]:
            raise ApplyError(
                f"live tensor {name} became {dtype_name(tensor.dtype)} {tuple(tensor.shape)}; "
                f"it was {known.dtype} {known.shape}"
            )
        try:
            return tensor_bits(tensor)
        except ValueError as error:
            raise ApplyError(f"live tensor {name}: {error}") from error

    def _check_frames(self, manifest: Manifest, parts: list[Frame], frames: list[bytes]) -> str:
        """The kind of `frames`, which must be all parts of one kind and go on the live version."""
        kind = parts[0].kind if parts else "delta"
        refs = {"delta": manifest.delta, "anchor": manifest.anchor}[kind]
        if not refs or [frame_digest(data) for data in frames] != [ref.hash for ref in refs]:
            raise ApplyError(
                f"these {len(frames)} frames are not the {kind} parts of version {manifest.version}"
            )
        for part, ref in zip(parts, refs, strict=True):
            if (part.kind, part.run_id, part.version) != (kind, manifest.run_id, manifest.version):
                raise ApplyError(
                    f"{ref.name} is a {part.kind} of version {part.version}, run {part.run_id}"
                )
        base = (manifest.base_version, manifest.base_state_hash)
        if kind == "delta" and base != (self.version, self._state_hash):
            raise ApplyError(
                f"the delta of version {manifest.version} goes on version {base[0]} with state "
                f"hash {str(base[1])[:12]}, but live is version {self.version} with "
                f"{str(self._state_hash)[:12]}"
            )
        return kind

    def _check_fits(self, run: Run) -> None:
        known = self._hashes.get(run.name)
        if known is None:
            raise ApplyError(f"the log holds tensor {run.name}, which is not among the live ones")
        if (run.dtype, run.shape) != known[:2]:
            raise ApplyError(
                f"tensor {run.name} is {run.dtype} {run.shape} in the log, "
                f"{known.dtype} {known.shape} here"
            )

    def _check_covers(self, runs: list[Run]) -> None:
        missing = self._hashes.keys() - {run.name for run in runs}
        gap = f"{min(missing)} is missing" if missing else uncovered(runs)
        if gap:
            raise ApplyError(f"the anchor does not hold every live tensor once: {gap}")

    def _decode(self, codec: RunCodec, run: Run, kind: str) -> Change:
        """What `run` changes in the live tensor, proven by its hash sum."""
        stop = run.start + run.num_elements
        old = self._bits(run.name)[run.start : stop]
        positions, new = codec.decode(run, old)
        if kind == "anchor":
            whole = old.copy()
            whole[positions] = new
            hash_sum = hash_elements(whole, run.start)
        else:
            hash_sum = hash_change(positions, old[positions], new, run.start)
        if hash_sum != run.hash_sum:
            raise ApplyError(f"rows of {run.name} from {run.row_start} on do not match their hash")
        if kind == "anchor" and len(positions) > len(old) // 2:
            # a contiguous write is smaller and quicker than one place after another
            return Change(run.name, run.start, stop, None, whole)
        return Change(run.name, run.start, stop, positions.astype(np.uint32), new)


def _unpack(manifest: Manifest, data: bytes) -> Frame:
    """A frame, or a WireError that names its file."""
    try:
        return unpack_frame(data)
    except WireError as error:
        refs = [*manifest.delta, *manifest.anchor]
        names = [ref.name for ref in refs if ref.hash == frame_digest(data)]
        raise WireError(f"{names[0] if names else 'a frame'} is {error}") from error
