"""Commits a version once all of its parts lie in the store.

The one idea: the committer adds up what the parts say of themselves, and reads nothing else of
them; that their bytes are what they say is for every reader to prove.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError, Manifest, PartRef, part_name
from gossamer.comm.state_hash import TensorHash, add_runs, state_hash
from gossamer.comm.wire import (
    DTYPE_BYTES,
    KINDS,
    Frame,
    Run,
    WireError,
    frame_digest,
    uncovered,
    unpack_frame,
)

if TYPE_CHECKING:
    from gossamer.comm.signing import Signer


class Committer:
    """What part 0 does for all; keeps what the last version was."""

    def __init__(
        self, log: WeightLog, num_parts: int, writer_epoch: int, signer: Signer | None
    ) -> None:
        self._log = log
        self._num_parts = num_parts
        self._epoch = writer_epoch
        self._signer = signer
        # what each tensor hashes to in the last version
        self._hashes: dict[str, TensorHash] = {}

    def commit(
        self,
        version: int,
        step: int,
        rewind_to_step: int | None,
        base: Manifest | None,
        own: dict[str, bytes],
    ) -> bool:
        """Commits `version` on `base`; False where another writer did.

        `own` holds the frames of part 0 by kind; the other parts put the same kinds. Raises
        LogError for parts that do not belong together.
        """
        refs: dict[str, list[PartRef]] = {kind: [] for kind in KINDS}
        runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
        num_changed = {kind: 0 for kind in KINDS}
        for kind in own:
            for part in range(self._num_parts):
                name = part_name(version, self._epoch, part, kind)
                data = self._log.store.get(name) if part else own[kind]
                frame = self._read_frame(name, data, (kind, version, step, part))
                refs[kind].append(PartRef(name, len(data), frame_digest(data)))
                runs[kind] += frame.runs
                num_changed[kind] += frame.num_changed
        gap = uncovered(runs["anchor"])
        if gap:
            raise LogError(f"the parts of version {version} do not add up: {gap}")
        hashes = add_runs(self._hashes, runs["delta" if base else "anchor"])
        sizes = [(math.prod(each.shape), DTYPE_BYTES[each.dtype]) for each in hashes.values()]
        parent = version - 1 if version else None
        manifest = Manifest(
            run_id=self._log.run_id,
            version=version,
            step=step,
            writer_epoch=self._epoch,
            parent_version=parent,
            parent_state_hash=None if parent is None else self._log.manifest(parent).state_hash,
            parent_hash=None if parent is None else self._log.manifest_hash(parent),
            base_version=base.version if base else None,
            base_state_hash=base.state_hash if base else None,
            state_hash=state_hash(hashes),
            rewind_to_step=rewind_to_step,
            delta=refs["delta"],
            anchor=refs["anchor"],
            num_tensors=len(hashes),
            num_changed=num_changed["delta" if base else "anchor"],
            num_elements=sum(elements for elements, _ in sizes),
            full_bytes=sum(elements * itemsize for elements, itemsize in sizes),
            created_s=time.time(),
        )
        if not self._log.commit(manifest, self._signer):
            return False
        self._hashes = hashes
        return True

    def _read_frame(self, name: str, data: bytes, about: tuple[str, int, int, int]) -> Frame:
        """A part's frame, checked to be of this version, step and run."""
        try:
            frame = unpack_frame(data)
        except WireError as error:
            raise LogError(f"{name} is {error}") from error
        expected = (*about, self._num_parts, self._log.run_id)
        found = (
            frame.kind,
            frame.version,
            frame.step,
            frame.part,
            frame.num_parts,
            frame.run_id,
        )
        if found != expected:
            raise LogError(
                f"{name} is (kind, version, step, part, num_parts, run_id) = {found}, "
                f"expected {expected}"
            )
        return frame
