"""Applies versions to live tensors in two steps: stage beside the running engine, then commit.

The one idea: staging reads the live (old) values, decodes and proves what the new state will hash
to, and touches nothing; committing exchanges the changed places with what was staged, which then
holds what was there, so that a failure half-way, or a rollback, puts every bit back.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from gossamer.comm.codec import build_codec
from gossamer.comm.codec.bits import dtype_name, find_changed, tensor_bits
from gossamer.comm.codec.kernels import exchange
from gossamer.comm.log import Manifest
from gossamer.comm.run import Run, WireError, overlap, uncovered
from gossamer.comm.state_hash import (
    MASK_64,
    format_hash,
    hash_change,
    hash_change_at,
    hash_elements,
    run_seed,
    tensor_seed,
)
from gossamer.comm.wire import Frame, frame_digest, unpack_frame

# beyond this share of changed elements a run is exchanged whole
WHOLE_SHARE = 0.5


class ApplyError(RuntimeError):
    """A version that does not go on these tensors; they are as they were."""


class Mirror(Protocol):
    """An engine's own copy of a tensor, where the tensor given to LiveWeights is an image of it."""

    def write(self, positions: np.ndarray | None, start: int, patterns: np.ndarray) -> None:
        """Writes bit patterns at flat `start + positions` (None: at `start` and what follows)."""
        ...

    def settle(self) -> None:
        """Called once after the last write of a commit or of a rollback."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The engine's bits of flat elements [start, stop)."""
        ...


@dataclass(slots=True)
class Change:
    """Bit patterns for elements [start, stop) of a tensor, or those at `start + positions`.

    New ones before the commit, the old ones after it.
    """

    name: str
    start: int
    stop: int
    positions: np.ndarray | None
    patterns: np.ndarray


@dataclass(slots=True)
class Staged:
    """A verified version, decoded against one live state."""

    manifest: Manifest
    live_version: int | None
    """The live version that it was decoded against."""
    sums: dict[str, int]
    """Of the live tensors once committed."""
    changes: list[Change] = field(default_factory=list)
    first_load: list[Run] = field(default_factory=list)
    """Runs to be decoded again by the commit: with no version live there is none to go back to,
    and no need for a second copy of the model."""

    @property
    def num_changed(self) -> int:
        """Elements that the commit writes."""
        return sum(len(each.patterns) for each in self.changes) + sum(
            run.num_elements for run in self.first_load
        )


@dataclass(frozen=True, slots=True)
class CommitStats:
    """What a commit did."""

    version: int
    pause_s: float
    """Time in which the live tensors were written."""
    num_changed: int
    """Elements written: the changed ones, or whole runs where most of them changed."""


class LiveWeights:
    """The live tensors of one engine, by logical name: contiguous CPU views on its storage.

    A tensor that the engine holds in another form (on a device, sliced, repacked) is given as an
    image in CPU memory, and `mirrors` names the engine's own copy.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        mirrors: dict[str, Mirror] | None = None,
        *,
        num_threads: int = 1,
    ) -> None:
        self.version: int | None = None
        self.tensors = tensors
        self._mirrors = mirrors or {}
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self._run_id: str | None = None
        self._state_hash: str | None = None
        self._kinds = {
            name: (dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        self._sums = dict.fromkeys(tensors, 0)
        self._undo: tuple[Staged, tuple] | None = None
        # bit patterns by name, and the tensor that they are a view on: a look costs little
        self._views: dict[str, tuple[tuple, np.ndarray]] = {}
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
            return Staged(manifest, self.version, self._sums)
        try:
            parts = [_unpack(manifest, data) for data in frames]
            kind = self._check_frames(manifest, parts, frames)
            runs = [run for part in parts for run in part.runs]
            for run in runs:
                self._check_fits(run)
            self._check_covers(runs, kind)
            decoded = list((self._pool.map if self._pool else map)(
                self._decode_anchor if kind == "anchor" else self._decode_delta, runs
            ))  # fmt: skip
        except WireError as error:
            raise ApplyError(f"version {manifest.version}: {error}") from error
        sums = dict.fromkeys(self._sums, 0) if kind == "anchor" else dict(self._sums)
        for run, (_, gain) in zip(runs, decoded, strict=True):
            sums[run.name] = (sums[run.name] + gain) & MASK_64
        self._check_hashes(manifest, parts, [gain for _, gain in decoded], sums)
        staged = Staged(manifest, self.version, sums)
        if kind == "anchor" and self.version is None:
            staged.first_load = runs
        else:
            staged.changes = [change for change, _ in decoded if change is not None]
        return staged

    def commit(self, staged: Staged) -> CommitStats:
        """Makes a staged version live, in place; on any failure puts back every bit and re-raises.

        The version that is live already is left as it is. Where no version is live a failure
        leaves none live. Raises ApplyError when another version became live since staging.
        """
        manifest = staged.manifest
        if (manifest.version, manifest.state_hash) == (self.version, self._state_hash):
            return CommitStats(manifest.version, 0.0, 0)
        if staged.live_version != self.version:
            raise ApplyError(
                f"version {manifest.version} was staged on version {staged.live_version}, "
                f"but version {self.version} is live"
            )
        self._undo = None
        started_s = time.perf_counter()
        self._exchange(staged.changes)
        for run in staged.first_load:
            self._load(run)
        self._settle(staged.first_load)
        pause_s = time.perf_counter() - started_s
        if not staged.first_load:
            self._undo = staged, (self.version, self._state_hash, self._run_id, self._sums)
        self.version, self._state_hash = manifest.version, manifest.state_hash
        self._run_id, self._sums = manifest.run_id, staged.sums
        return CommitStats(manifest.version, pause_s, staged.num_changed)

    def rollback(self) -> int | None:
        """Undoes the last commit, once; returns the version that is live again.

        Raises ApplyError when there is nothing to undo: no commit since, or a first load.
        """
        if self._undo is None:
            raise ApplyError(f"version {self.version} has no commit to be rolled back")
        (staged, before), self._undo = self._undo, None
        self._exchange(staged.changes)
        self.version, self._state_hash, self._run_id, self._sums = before
        return self.version

    def audit(self) -> str:
        """State hash of the live tensors, read in full, mirrors where there are any."""
        return format_hash(sum(self._hash_live(name) for name in self.tensors))

    def differing(self) -> list[str]:
        """Tensors whose live bits are not those of the live version, read in full."""
        return [name for name in self.tensors if self._hash_live(name) != self._sums[name]]

    def _hash_live(self, name: str) -> int:
        bits = self._bits(name)
        seed = tensor_seed(name, *self._kinds[name])
        mirror = self._mirrors.get(name)
        return hash_elements(mirror.read(0, len(bits)) if mirror else bits, seed)

    def _bits(self, name: str) -> np.ndarray:
        """Flat bit patterns of a live tensor, which must still be what it was."""
        tensor, known = self.tensors[name], self._kinds[name]
        view = self._views.get(name)
        if view and view[0] == (tensor.data_ptr(), tensor.dtype, tensor.shape):
            return view[1]
        if (dtype_name(tensor.dtype), tuple(tensor.shape)) != known:
            raise ApplyError(
                f"live tensor {name} became {dtype_name(tensor.dtype)} {tuple(tensor.shape)}; "
                f"it was {known[0]} {known[1]}"
            )
        try:
            bits = tensor_bits(tensor)
        except ValueError as error:
            raise ApplyError(f"live tensor {name}: {error}") from error
        self._views[name] = (tensor.data_ptr(), tensor.dtype, tensor.shape), bits
        return bits

    def _exchange(self, changes: list[Change]) -> None:
        """Swaps `changes` with what is live; on failure swaps back and re-raises."""
        done = []
        try:
            for change in changes:
                self._swap(change)
                done.append(change)
            self._settle(changes)
        except BaseException:
            for change in reversed(done):
                self._swap(change)
            self._settle(changes)
            raise

    def _swap(self, change: Change) -> None:
        """Writes `change` and leaves in it what was live."""
        live = self._bits(change.name)[change.start : change.stop]
        mirror = self._mirrors.get(change.name)
        where = slice(None) if change.positions is None else change.positions
        if mirror:
            try:
                mirror.write(change.positions, change.start, change.patterns)
            except BaseException:
                mirror.write(change.positions, change.start, live[where])
                raise
        if change.positions is None:
            before = live.copy()
            live[:] = change.patterns
            change.patterns = before
        else:
            exchange(live, change.positions, change.patterns)

    def _load(self, run: Run) -> None:
        """Decodes a run of a first anchor straight into the live tensor."""
        live = self._bits(run.name)[run.start : run.start + run.num_elements]
        _, patterns = build_codec(run.codec).decode(run, live)
        live[:] = patterns
        if run.name in self._mirrors:
            self._mirrors[run.name].write(None, run.start, patterns)

    def _settle(self, written: list[Change] | list[Run]) -> None:
        for name in {each.name for each in written} & self._mirrors.keys():
            self._mirrors[name].settle()

    def _check_frames(self, manifest: Manifest, parts: list[Frame], frames: list[bytes]) -> str:
        """The kind of `frames`, which must be all parts of one kind and go on the live version."""
        kind = parts[0].kind if parts else "delta"
        refs = {"delta": manifest.delta, "anchor": manifest.anchor}[kind]
        if not refs or [frame_digest(data) for data in frames] != [ref.hash for ref in refs]:
            raise ApplyError(
                f"these {len(frames)} frames are not the {kind} parts of version {manifest.version}"
            )
        base = (manifest.base_version, manifest.base_state_hash)
        expected = (
            kind,
            manifest.run_id,
            manifest.version,
            *(base if kind == "delta" else (None,) * 2),
        )
        for part, ref in zip(parts, refs, strict=True):
            found = part.kind, part.run_id, part.version, part.base_version, part.base_state_hash
            if found != expected:
                raise ApplyError(
                    f"{ref.name} is (kind, run_id, version, base, base hash) = {found}, "
                    f"expected {expected}"
                )
        if kind == "delta" and base != (self.version, self._state_hash):
            raise ApplyError(
                f"the delta of version {manifest.version} goes on version {base[0]} with state "
                f"hash {base[1]}, but live is version {self.version} with {self._state_hash}"
            )
        return kind

    def _check_fits(self, run: Run) -> None:
        known = self._kinds.get(run.name)
        if known is None:
            raise ApplyError(f"the log holds tensor {run.name}, which is not among the live ones")
        if (run.dtype, run.shape) != known:
            raise ApplyError(
                f"tensor {run.name} is {run.dtype} {run.shape} in the log, "
                f"{known[0]} {known[1]} here"
            )

    def _check_covers(self, runs: list[Run], kind: str) -> None:
        """An anchor holds every row once, a delta no row twice."""
        if kind == "delta":
            gap = overlap(runs)
        else:
            missing = self._kinds.keys() - {run.name for run in runs}
            gap = f"{min(missing)} is missing" if missing else uncovered(runs)
        if gap:
            held = "every live tensor once" if kind == "anchor" else "any row at most once"
            raise ApplyError(f"the {kind} does not hold {held}: {gap}")

    def _check_hashes(
        self, manifest: Manifest, parts: list[Frame], gains: list[int], sums: dict[str, int]
    ) -> None:
        """What was decoded must add up to each part's gain, and to the manifest's state."""
        taken = 0
        for part in parts:
            gain = sum(gains[taken : taken + len(part.runs)]) & MASK_64
            taken += len(part.runs)
            if gain != part.hash_gain:
                drifted = ", ".join(self.differing() if part.kind == "delta" else []) or "none"
                raise ApplyError(
                    f"part {part.part} of version {manifest.version} decodes to other values than "
                    f"its writer hashed; live tensors that are not those of version "
                    f"{self.version}: {drifted}"
                )
        after = format_hash(sum(sums.values()))
        if after != manifest.state_hash:
            raise ApplyError(
                f"version {manifest.version} would leave state hash {after} where its manifest "
                f"says {manifest.state_hash}"
            )

    def _decode_delta(self, run: Run) -> tuple[Change | None, int]:
        """What `run` changes in the live tensor, and what that adds to the tensor's sum."""
        stop = run.start + run.num_elements
        old = self._bits(run.name)[run.start : stop]
        positions, patterns = build_codec(run.codec).decode(run, old)
        if positions is None:
            return self._whole(run, old, patterns)
        gain = hash_change_at(run_seed(run), positions, old, patterns)
        return Change(run.name, run.start, stop, positions, patterns), gain

    def _decode_anchor(self, run: Run) -> tuple[Change | None, int]:
        """What differs from the live tensor, nothing on a first load; and the run's sum."""
        old = self._bits(run.name)[run.start : run.start + run.num_elements]
        positions, patterns = build_codec(run.codec).decode(run, old)
        if positions is not None:
            raise WireError(f"{run.name} is coded by {run.codec}, which an anchor cannot be")
        gain = hash_elements(patterns, run_seed(run))
        return None if self.version is None else self._whole(run, old, patterns)[0], gain

    def _whole(self, run: Run, old: np.ndarray, patterns: np.ndarray) -> tuple[Change, int]:
        """A dense run as the changes it makes, or whole where most of it changes."""
        seed, stop = run_seed(run), run.start + run.num_elements
        positions, before, after = find_changed(old, patterns)
        gain = hash_change(seed, positions, before, after)
        if len(positions) > WHOLE_SHARE * len(old):
            return Change(run.name, run.start, stop, None, patterns), gain
        return Change(run.name, run.start, stop, positions, after), gain


def _unpack(manifest: Manifest, data: bytes) -> Frame:
    """A frame, or a WireError that names its file."""
    try:
        return unpack_frame(data)
    except WireError as error:
        refs = [*manifest.delta, *manifest.anchor]
        names = [ref.name for ref in refs if ref.hash == frame_digest(data)]
        raise WireError(f"{names[0] if names else 'a frame'} is {error}") from error
