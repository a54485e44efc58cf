"""Deletes from a log of rounds what nobody who comes or returns needs any more.

The one idea: whoever comes reads an anchor and the rounds after it; so messages and anchors behind
the last few anchors go, after a grace, and records stay for ever: they are small, they hold the
books, and a round whose record were missing would be settled anew.

gc.json holds {"floors": [[round, since]], "swept": round}: since when (Unix time) that round is a
floor, and below which round all is gone.
"""

from __future__ import annotations

import json
import time

from gossamer.comm.outer.record import ANCHOR, RECORD, anchor_name, groups
from gossamer.comm.store import Store

GRACE_S = 600.0
"""A reader that chose its anchor this long ago has read it."""


def sweep(store: Store, keep_anchors: int, grace_s: float | None = None) -> int:
    """Deletes what lies behind the last `keep_anchors` anchors since `grace_s` (None: GRACE_S).

    Returns how many files. May be killed anywhere, run again, and run by several at once. A replica
    that is further behind finds no messages any more and must start from the newest anchor.
    """
    grace_s = GRACE_S if grace_s is None else grace_s
    if keep_anchors < 1 or grace_s < 0:
        raise ValueError(
            f"keep_anchors must be at least 1 and grace_s not negative, not {keep_anchors} and"
            f" {grace_s}"
        )
    anchors = _numbers(store, "anchor-", ANCHOR)
    if len(anchors) < keep_anchors:
        return 0
    swept, floor = _swept_to(store, anchors[-keep_anchors], grace_s)
    # an anchor goes before its parts: one that is listed is whole
    stale = [anchor_name(number) for number in anchors if number < floor]
    for number in range(swept, floor):
        stale += store.list(f"anchors/{number:08d}/")
    # a message that came late counts in the round after its own
    for number in range(max(0, swept - 1), floor - 1):
        stale += store.list(f"rounds/{number:08d}/")
    for name in stale:
        store.delete(name)
    if stale:
        _note(store, swept=floor)
    return len(stale)


def clear(store: Store) -> None:
    """Deletes a whole log of rounds, for a new run to take its place."""
    records = _numbers(store, "round-", RECORD)
    for number in range(max(records, default=0) + 2):
        for folder in ("rounds", "anchors"):
            for name in store.list(f"{folder}/{number:08d}/"):
                store.delete(name)
    for folder in ("left/", "replicas/", "members/", "recipe/", ""):
        for name in store.list(folder):
            store.delete(name)


def _swept_to(store: Store, floor: int, grace_s: float) -> tuple[int, int]:
    """Below which round all is gone already, and below which it may go now."""
    told, now_s = _noted(store), time.time()
    # never beyond what is kept now, whatever the file says
    floors = {int(at): float(since_s) for at, since_s in told["floors"] if at <= floor}
    floors.setdefault(floor, now_s)
    over = max((at for at, since_s in floors.items() if now_s - since_s >= grace_s), default=0)
    kept = [[at, since_s] for at, since_s in sorted(floors.items()) if at >= over]
    if kept != told["floors"]:
        _note(store, floors=kept)
    return min(int(told["swept"]), over), over


def _noted(store: Store) -> dict:
    try:
        told = json.loads(store.get("gc.json"))
        return {"floors": [(at, since_s) for at, since_s in told["floors"]], "swept": told["swept"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {"floors": [], "swept": 0}


def _note(store: Store, **changed: object) -> None:
    store.put("gc.json", json.dumps(_noted(store) | changed).encode(), overwrite=True)


def _numbers(store: Store, prefix: str, pattern: str) -> list[int]:
    found = [groups(name, pattern) for name in store.list(prefix)]
    return sorted(int(each[0]) for each in found if each)
