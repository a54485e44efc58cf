"""Copies a log to another store, so that each frame crosses the thin link once.

The one idea: a version's manifest is put after all that it names, so the copy is a sound log at
every moment, and whoever goes on after a kill sees in it what is left to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import (
    GoneError,
    LogError,
    PartRef,
    epoch_name,
    file_hash,
    manifest_name,
)
from gossamer.comm.store import Store
from gossamer.comm.wire import WireError, unpack_frame

PARTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Mirrored:
    """How far a copy is."""

    version: int | None
    """The newest version of the copy."""
    head: int | None
    """The newest version of the source, when last seen."""
    copied_bytes: int
    """Of frames, in this call."""


def mirror(
    source: WeightLog,
    destination: Store,
    *,
    follow: bool = False,
    from_version: int | None = None,
    poll_s: float = 1.0,
    on_progress: Callable[[Mirrored], None] | None = None,
    stop: threading.Event | None = None,
) -> Mirrored:
    """Copies versions up to the source's head; with `follow`, new ones too until `stop` is set.

    A copy that holds versions goes on after its newest. An empty one begins at `from_version`,
    which must hold an anchor (default: the newest anchor). Frames and manifests are checked as a
    subscriber would check them; folds are not copied. May be killed anywhere and run again.
    `on_progress` is called after each frame and version. Raises LogError for a damaged source or
    a copy of another log, OSError where a store fails.
    """
    stop = stop or threading.Event()
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        copy = _Copy(source, destination)
        newest, head, copied_bytes = copy.log.head(), source.head(), 0

        def tell() -> Mirrored:
            mirrored = Mirrored(newest, head, copied_bytes)
            if on_progress:
                on_progress(mirrored)
            return mirrored

        while True:
            version = copy.next_version(newest, head, from_version)
            if version is None or stop.is_set():
                if not follow or stop.wait(poll_s):
                    return tell()
                head = source.head()
                continue
            try:
                for nbytes in copy.add(version, pool):
                    copied_bytes += nbytes
                    tell()
            except (GoneError, FileNotFoundError):
                # the source deletes what is too old for it; it was slow to come here
                if source.newest_anchor() <= version:
                    raise
                head, from_version = source.head(), None
                continue
            newest = version
            tell()


class _Copy:
    """The copy in `store` of the log `source`."""

    def __init__(self, source: WeightLog, store: Store) -> None:
        self._source = source
        self._store = store
        self._put_same("log.json", source.store.get("log.json"))
        self.log = WeightLog(store, source.run_id, "the copy")
        self._epoch = self.log.current_epoch()

    def next_version(
        self, newest: int | None, head: int | None, from_version: int | None
    ) -> int | None:
        """What to copy after `newest`; None when that is the head. Raises LogError."""
        if head is None or (newest is not None and newest >= head):
            return None
        if newest is None and from_version is not None:
            if not self._source.manifest(from_version).anchor:
                raise LogError(f"from_version {from_version} holds no anchor to begin with")
            return from_version
        if newest is not None and self._source.is_committed(newest + 1):
            return newest + 1
        anchor = self._source.newest_anchor()
        if newest is not None and anchor <= newest:
            raise LogError(f"{manifest_name(newest + 1)} is missing from {self._source.url}")
        return anchor

    def add(self, version: int, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Copies a version; yields the bytes of each frame that crossed."""
        manifest, name = self._source.manifest(version), manifest_name(version)
        text = self._source.store.get(name)
        if file_hash(text) != self._source.manifest_hash(version):
            raise LogError(f"{name} of {self._source.url} changed while it was copied")
        while self._epoch < manifest.writer_epoch:
            claim = epoch_name(self._epoch + 1)
            self._put_same(claim, self._source.store.get(claim))
            self._epoch += 1
        yield from pool.map(self._add_part, [*manifest.delta, *manifest.anchor])
        self._put_same(name, text)
        self._store.put("HEAD", str(version).encode(), overwrite=True)

    def _add_part(self, ref: PartRef) -> int:
        found = self._store.size(ref.name)
        if found is None:
            data = self._source.read_part(ref)
            try:
                unpack_frame(data)
            except WireError as error:
                raise LogError(f"{ref.name} is {error}") from error
            self._store.put(ref.name, data)
            return ref.nbytes
        if found != ref.nbytes:
            raise LogError(f"{ref.name} has {found} bytes in the copy, not {ref.nbytes}")
        return 0  # from before a kill

    def _put_same(self, name: str, data: bytes) -> None:
        """Raises LogError where the copy holds another file of that name."""
        if not self._store.put(name, data) and self._store.get(name) != data:
            raise LogError(f"{name} of the copy is not that of {self._source.url}: two logs")
