"""Commits a version once all of its parts lie in the store.

The one idea: the committer adds up what the parts' tables say, and reads nothing else of them; that
their bytes are what they say is for every reader to prove.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError, Manifest, PartRef, part_name
from gossamer.comm.reader import head_of
from gossamer.comm.run import DTYPE_BYTES, Run, uncovered
from gossamer.comm.state_hash import format_hash
from gossamer.comm.wire import DIGEST_BYTES, HEADER, SIGNATURE_BYTES, Frame, frame_digest

if TYPE_CHECKING:
    from gossamer.comm.signing import Signer

PARTS_AT_ONCE = 16
TOTALS = ("num_tensors", "num_elements", "full_bytes")


class Committer:
    """What part 0 does for all."""

    def __init__(
        self, log: WeightLog, num_parts: int, writer_epoch: int, signer: Signer | None
    ) -> None:
        self._log = log
        self._num_parts = num_parts
        self._epoch = writer_epoch
        self._signer = signer

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
        heads: dict[str, list[Frame]] = {}
        refs: dict[str, list[PartRef]] = {"delta": [], "anchor": []}
        for kind, data in own.items():
            heads[kind], refs[kind] = self._look(version, kind, data)
            for part, (head, ref) in enumerate(zip(heads[kind], refs[kind], strict=True)):
                self._check(head, ref.name, (kind, version, step, part), base)
        runs = [run for head in heads.get("anchor", []) for run in head.runs]
        gap = uncovered(runs)
        if gap:
            raise LogError(f"the parts of version {version} do not add up: {gap}")
        changes = heads["delta" if base else "anchor"]
        state = int(base.state_hash, 16) if base else 0
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
            state_hash=format_hash(state + sum(head.hash_gain for head in changes)),
            rewind_to_step=rewind_to_step,
            delta=refs["delta"],
            anchor=refs["anchor"],
            num_changed=sum(head.num_changed for head in changes),
            created_s=time.time(),
            **({field: getattr(base, field) for field in TOTALS} if base else _totals(runs)),
        )
        return self._log.commit(manifest, self._signer)

    def _look(self, version: int, kind: str, own: bytes) -> tuple[list[Frame], list[PartRef]]:
        """Head and reference of every part's frame of one kind."""

        def look(part: int) -> tuple[Frame, PartRef]:
            name = part_name(version, self._epoch, part, kind)
            if part == 0:
                return _head_and_ref(name, len(own), lambda start, stop: own[start:stop])
            nbytes = self._log.store.size(name) or 0
            return _head_and_ref(name, nbytes, partial(self._log.store.get, name))

        found = [look(0)]
        if self._num_parts > 1:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                found += pool.map(look, range(1, self._num_parts))
        return [head for head, _ in found], [ref for _, ref in found]

    def _check(
        self, head: Frame, name: str, about: tuple[str, int, int, int], base: Manifest | None
    ) -> None:
        """Raises LogError unless the frame `name` is this writer's, of this version and base."""
        kind, version, step, part = about
        on = (base.version, base.state_hash) if base and kind == "delta" else (None, None)
        expected = {
            "kind": kind,
            "run_id": self._log.run_id,
            "version": version,
            "base_version": on[0],
            "base_state_hash": on[1],
            "step": step,
            "writer_epoch": self._epoch,
            "part": part,
            "num_parts": self._num_parts,
        }
        for field, value in expected.items():
            if getattr(head, field) != value:
                raise LogError(f"{name} has {field} {getattr(head, field)}, expected {value}")


def _head_and_ref(
    name: str, nbytes: int, get: Callable[[int, int], bytes]
) -> tuple[Frame, PartRef]:
    ends = get(0, HEADER.size) + get(nbytes - DIGEST_BYTES - SIGNATURE_BYTES, nbytes)
    return head_of(get, nbytes, name), PartRef(name, nbytes, frame_digest(ends))


def _totals(runs: list[Run]) -> dict[str, int]:
    """What every version of these tensors has in common, for its manifest."""
    tensors = {run.name: (math.prod(run.shape), DTYPE_BYTES[run.dtype]) for run in runs}
    return {
        "num_tensors": len(tensors),
        "num_elements": sum(elements for elements, _ in tensors.values()),
        "full_bytes": sum(elements * itemsize for elements, itemsize in tensors.values()),
    }
