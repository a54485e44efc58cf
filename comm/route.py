"""Which files take a reader from the version it holds to the head at the fewest bytes.

The one idea: deltas and folds lead from one version to a later one, anchors lead there from
anywhere; so a walk back from the head meets every version once with its cheapest way on, and need
not look where going on costs more than the best anchor found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from gossamer.comm.manifest import GoneError, LogError, Manifest, PartRef, total_bytes

if TYPE_CHECKING:
    from gossamer.comm.log import WeightLog


@dataclass(frozen=True, slots=True)
class Hop:
    """Frames that together make a version live."""

    kind: str
    """`delta`, `fold` or `anchor`."""
    manifest: Manifest
    """The version's own, or the fold's."""
    refs: list[PartRef]

    @property
    def nbytes(self) -> int:
        return total_bytes(self.refs)


def hops_to(log: WeightLog, version: int, folds: list[tuple[int, int]]) -> Iterator[Hop]:
    """Every hop that ends in `version` and whose files are not to be avoided."""
    found: list[tuple[str, Manifest]] = []
    try:
        found.append(("delta", log.manifest(version)))
    except GoneError:
        pass
    for first, last in folds:
        try:
            if last == version:
                found.append(("fold", log.fold(first, last)))
        except LogError:
            continue  # nobody needs a fold
    for kind, manifest in found:
        for hop in (Hop(kind, manifest, manifest.delta), Hop("anchor", manifest, manifest.anchor)):
            if hop.refs and not log.avoids(hop.refs):
                yield hop


def best_hop(log: WeightLog, live: int | None, version: int) -> Hop | None:
    """The cheapest single hop from `live` to `version`, if there is one."""
    folds = log.folds() if live is not None and version - live > 1 else []
    fitting = [
        hop
        for hop in hops_to(log, version, folds)
        if hop.kind == "anchor" or hop.manifest.base_version == live
    ]
    return min(fitting, key=lambda hop: hop.nbytes, default=None)


def first_stop(log: WeightLog, live: int | None, head: int) -> int:
    """Where the cheapest way from `live` to `head` stops first. Raises LogError: no way."""
    folds = log.folds() if live is not None and head - live > 1 else []
    bytes_to_head: dict[int | None, float] = {head: 0}
    next_stop: dict[int | None, int] = {}
    jump, jump_bytes = -1, inf
    for version in range(head, -1 if live is None else live, -1):
        so_far = bytes_to_head.get(version, inf)
        if so_far >= jump_bytes:
            continue
        for hop in hops_to(log, version, folds):
            through, base = so_far + hop.nbytes, hop.manifest.base_version
            if hop.kind == "anchor":
                if through < jump_bytes:
                    jump, jump_bytes = version, through
            elif through < bytes_to_head.get(base, inf):
                bytes_to_head[base], next_stop[base] = through, version
        if live is None and jump >= 0:
            break  # an older anchor would need more deltas
    if live in next_stop and bytes_to_head[live] <= jump_bytes:
        return next_stop[live]
    if jump < 0:
        raise LogError(f"the log at {log.url} holds no anchor up to version {head}")
    return jump
