"""The weight log: versions of a model's weights as files in a store.

The one idea: a version exists when its manifest was created, and a manifest can be created only
once. Everything else (parts, epochs) is written before, under names of its own, and HEAD is only
a hint of where to look.

    log.json                        run_id and wire version
    epoch-0001.json                 one for each writer that ever claimed the log
    parts/00000012-e0001-p0.delta   frames (wire.py); or .anchor
    manifest-00000012.json          the commit of version 12 (manifest.py)
    fold-00000010-00000020.json     a shortcut over several versions (fold.py)
    HEAD                            a version not later than the newest
    gc.json                         what retention.py may delete from when on
"""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.comm.manifest import (
    GoneError,
    LogError,
    Manifest,
    PartRef,
    epoch_name,
    file_hash,
    fold_name,
    manifest_name,
    numbers_in,
    pack_manifest,
    unpack_manifest,
)
from gossamer.comm.route import Hop, best_hop, first_stop
from gossamer.comm.store import Store, open_store
from gossamer.comm.wire import WIRE_VERSION, frame_digest, frame_signature

if TYPE_CHECKING:
    from gossamer.comm.signing import Signer, Verifier

# enough for a reader that lags to walk to the head without reading one twice
CACHED_MANIFESTS = 1 << 14


class StaleWriterError(LogError):
    """Another writer took over the log, or holds it."""


class WeightLog:
    """One run's log in one store. Safe to share between threads."""

    def __init__(
        self, store: Store, run_id: str, url: str, verifier: Verifier | None = None
    ) -> None:
        self.store = store
        self.run_id = run_id
        self.url = url
        self.public_key: str | None = None
        """The file of the key that it was opened with."""
        self._verifier = verifier
        # by file name, with the hash of the file
        self._manifests: dict[str, tuple[Manifest, str]] = {}
        self._avoided: set[str] = set()

    @classmethod
    def open(
        cls,
        url: str | Path,
        run_id: str | None = None,
        create: bool = False,
        public_key: str | Path | None = None,
        name: str = "",
    ) -> WeightLog:
        """The log at `url`; with `create`, made there if it does not exist.

        `run_id` is checked against the log's, or is that of a new log (default: a random one, with
        `name` before it). With the file of a `public_key`, every frame and manifest that it did not
        sign is refused. Raises LogError where there is no log, or one of another run.
        """
        verifier = None
        if public_key is not None:
            from gossamer.comm.signing import Verifier

            verifier = Verifier.from_file(public_key)
        try:
            store = open_store(url, create)
            if create:
                random = uuid.uuid4().hex
                fresh = run_id or (f"{name}-{random[:16]}" if name else random)
                entry = {"run_id": fresh, "wire_version": WIRE_VERSION}
                store.put("log.json", json.dumps(entry).encode())
            text = store.get("log.json")
        except FileNotFoundError as error:
            raise LogError(f"no weight log at {url}: {error}") from error
        try:
            found = json.loads(text)
            run_of_log, wire_version = found["run_id"], found["wire_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise LogError(f"{url}/log.json must hold run_id and wire_version") from error
        if run_id is not None and run_of_log != run_id:
            raise LogError(f"the log at {url} is of run {run_of_log}, not {run_id}")
        if wire_version != WIRE_VERSION:
            raise LogError(f"the log at {url} has wire version {wire_version}, not {WIRE_VERSION}")
        log = cls(store, run_of_log, str(url), verifier)
        log.public_key = None if public_key is None else str(public_key)
        return log

    # --- versions -------------------------------------------------------------------------------

    def head(self) -> int | None:
        """The newest version, None in an empty log."""
        version = self._hint()
        while self.is_committed(version + 1):
            version += 1
        return None if version < 0 else version

    def versions(self) -> list[int]:
        """All versions that are still there, ascending."""
        return [version for (version,) in self._numbers("manifest-", r"manifest-(\d+)\.json")]

    def folds(self) -> list[tuple[int, int]]:
        """(first, last) of every fold."""
        return [(a, b) for a, b in self._numbers("fold-", r"fold-(\d+)-(\d+)\.json")]

    def is_committed(self, version: int) -> bool:
        """True while the version's manifest exists."""
        name = manifest_name(version)
        return name in self._manifests or self.store.size(name) is not None

    def manifest(self, version: int) -> Manifest:
        """Raises LogError, naming the file, when it is missing, malformed or not signed."""
        return self._entry(manifest_name(version), version)[0]

    def manifest_hash(self, version: int) -> str:
        """Hash of the version's manifest file, as its child names it. Raises as `manifest`."""
        return self._entry(manifest_name(version), version)[1]

    def fold(self, first: int, last: int) -> Manifest:
        """The delta from version `first` to `last`. Raises as `manifest`."""
        manifest, _ = self._entry(fold_name(first, last), last)
        if manifest.base_version != first:
            raise LogError(f"{fold_name(first, last)} goes on version {manifest.base_version}")
        return manifest

    def newest_anchor(self, at_most: int | None = None) -> int:
        """The newest version, `at_most` this one, that holds an anchor. Raises LogError."""
        version = self.head() if at_most is None else at_most
        try:
            for candidate in range(-1 if version is None else version, -1, -1):
                if self.manifest(candidate).anchor:
                    return candidate
        except GoneError:
            pass
        raise LogError(f"the log at {self.url} holds no anchor up to version {version}")

    def next_version(self, live: int | None) -> int | None:
        """What to apply on `live` to get nearer to the head by the fewest bytes; None at the head.

        Raises LogError where no way leads there.
        """
        head = self.head()
        if head is None or (live is not None and live >= head):
            return None
        try:
            return first_stop(self, live, head)
        except LogError as error:
            if self.head() != head:
                return self.next_version(live)  # too slow: the version is old, and gone
            if not self._avoided:
                raise
            avoided, self._avoided = self._avoided, set()  # whoever asks again, looks again
            names = ", ".join(sorted(avoided))
            raise LogError(f"{error}; missing or unsound: {names}") from error

    def hop(self, live: int | None, version: int) -> Hop | None:
        """The cheapest way from `live` straight to `version`, if there is one."""
        return best_hop(self, live, version)

    # --- parts ----------------------------------------------------------------------------------

    def read_part(self, ref: PartRef) -> bytes:
        """The frame of a committed version.

        Raises GoneError where it is missing, LogError where it is another, SignatureError.
        """
        try:
            data = self.store.get(ref.name, 0, ref.nbytes + 1)
        except FileNotFoundError as error:
            self.avoid([ref])
            self._manifests.clear()  # its own is likely to be gone as well
            raise GoneError(f"part of a committed version: {error}") from error
        if len(data) != ref.nbytes or frame_digest(data) != ref.hash:
            raise LogError(
                f"{ref.name} has {len(data)} bytes and digest {frame_digest(data)[:8]}; "
                f"its manifest says {ref.nbytes} and {ref.hash[:8]}"
            )
        if self._verifier is not None:
            self._verifier.check(bytes.fromhex(ref.hash), frame_signature(data), ref.name)
        return data

    def avoid(self, refs: list[PartRef]) -> None:
        """Has `next_version` and `hop` go other ways, until there is no other."""
        self._avoided.update(ref.name for ref in refs)

    def avoids(self, refs: list[PartRef]) -> bool:
        """True for parts to be avoided, those that were missing among them."""
        return any(ref.name in self._avoided for ref in refs)

    # --- writers --------------------------------------------------------------------------------

    def commit(self, manifest: Manifest, signer: Signer | None = None) -> bool:
        """Creates the version; False, and nothing changed, where another writer already did."""
        text = pack_manifest(manifest, signer)
        if not self.store.put(manifest_name(manifest.version), text):
            return False
        try:
            self.store.put("HEAD", str(manifest.version).encode(), overwrite=True)
        except OSError:
            pass  # the version exists; HEAD is only a hint
        return True

    def current_epoch(self) -> int:
        """The newest writer's epoch, 0 when none was claimed."""
        return max((epoch for (epoch,) in self._numbers("epoch-", r"epoch-(\d+)\.json")), default=0)

    def is_superseded(self, epoch: int) -> bool:
        """True once a newer writer has claimed the log; claims leave no gap."""
        return self.store.size(epoch_name(epoch + 1)) is not None

    def claim_epoch(self, takeover: bool = False) -> int:
        """Makes the caller the newest writer; with `takeover`, older ones are stale from now on.

        Raises StaleWriterError without it, where the log has a writer.
        """
        claim = json.dumps({"claimed_s": time.time()}).encode()
        epoch = self.current_epoch() + 1
        while epoch == 1 or takeover:
            if self.store.put(epoch_name(epoch), claim):
                return epoch
            epoch += 1
        raise StaleWriterError(
            f"the log at {self.url} has a writer, epoch {self.current_epoch()}; "
            "whoever goes on in its place must take over (takeover=True)"
        )

    # --- parts of the above ---------------------------------------------------------------------

    def _entry(self, name: str, version: int) -> tuple[Manifest, str]:
        """The manifest in the file `name`, and the file's hash."""
        entry = self._manifests.get(name)
        if entry is None:
            try:
                data = self.store.get(name)
            except FileNotFoundError as error:
                raise GoneError(str(error)) from error
            manifest = unpack_manifest(data, name, self._verifier)
            if manifest.version != version or manifest.run_id != self.run_id:
                raise LogError(
                    f"{name} is of run {manifest.run_id}, version {manifest.version}; "
                    f"expected run {self.run_id}"
                )
            if len(self._manifests) >= CACHED_MANIFESTS:
                self._manifests.clear()
            entry = self._manifests[name] = manifest, file_hash(data)
        return entry

    def _hint(self) -> int:
        """A committed version, -1 when there is none."""
        try:
            hint = self.store.get("HEAD")
            if hint.isdigit() and len(hint) < 16 and self.is_committed(int(hint)):
                return int(hint)
        except FileNotFoundError:
            pass
        return max(self.versions(), default=-1)

    def _numbers(self, prefix: str, pattern: str) -> list[tuple[int, ...]]:
        found = (numbers_in(name, pattern) for name in self.store.list(prefix))
        return sorted(numbers for numbers in found if numbers)
