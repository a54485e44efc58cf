"""The weight log: versions of a model's weights as files in a store.

The one idea: a version exists when its manifest was created, and a manifest can be created only
once. Everything else (parts, epochs) is written before, under names of its own, and HEAD is only
a hint of where to look.

    log.json                        run_id and wire version
    epoch-0001.json                 one for each writer that ever claimed the log
    parts/00000012-e0001-p0.delta   frames (wire.py); or .anchor
    manifest-00000012.json          the commit of version 12
    HEAD                            a version not later than the newest
"""

from __future__ import annotations

import json
import re
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from gossamer.comm.store import Store, open_store
from gossamer.comm.wire import KINDS, WIRE_VERSION, frame_digest

T = TypeVar("T")

# enough for a late joiner to walk to the head without reading one twice
CACHED_MANIFESTS = 1024


class LogError(RuntimeError):
    """A log that is missing, of another run, or damaged."""


class StaleWriterError(LogError):
    """Another writer took over the log."""


@dataclass(frozen=True, slots=True)
class PartRef:
    """One frame of a version."""

    name: str
    nbytes: int
    hash: str
    """The frame's own digest, hex."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a version is: written once, by part 0, when all parts lie in the store."""

    run_id: str
    version: int
    step: int
    """Optimizer steps behind these weights."""
    writer_epoch: int
    base_version: int | None
    """The version that `delta` applies on; None where only an anchor exists."""
    base_state_hash: str | None
    state_hash: str
    """Hash of the whole state after this version (state_hash.py)."""
    rewind_to_step: int | None
    """Set where a resumed writer took over: steps after this one never happened."""
    delta: list[PartRef]
    anchor: list[PartRef]
    num_tensors: int
    num_changed: int
    """Elements that differ from the base; all of them where only an anchor exists."""
    num_elements: int
    full_bytes: int
    """Bytes of all weights in their publish dtypes."""
    created_s: float
    """Unix time."""


class WeightLog:
    """One run's log in one store. Safe to share between threads."""

    def __init__(self, store: Store, run_id: str, url: str) -> None:
        self.store = store
        self.run_id = run_id
        self.url = url
        self._manifests: dict[int, Manifest] = {}

    @classmethod
    def open(cls, url: str | Path, run_id: str | None = None, create: bool = False) -> WeightLog:
        """The log at `url`; with `create`, made there if it does not exist.

        `run_id` is checked against the log's, or names a new log (default: a random one).
        Raises LogError where there is no log, or one of another run.
        """
        try:
            store = open_store(url, create)
            if create:
                fresh = {"run_id": run_id or uuid.uuid4().hex, "wire_version": WIRE_VERSION}
                store.put("log.json", json.dumps(fresh).encode())
            found = json.loads(store.get("log.json"))
            run_of_log, wire_version = found["run_id"], found["wire_version"]
        except FileNotFoundError as error:
            raise LogError(f"no weight log at {url}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LogError(f"{url}/log.json must hold run_id and wire_version") from error
        if run_id is not None and run_of_log != run_id:
            raise LogError(f"the log at {url} is of run {run_of_log}, not {run_id}")
        if wire_version != WIRE_VERSION:
            raise LogError(f"the log at {url} has wire version {wire_version}, not {WIRE_VERSION}")
        return cls(store, run_of_log, str(url))

    def head(self) -> int | None:
        """The newest version, None in an empty log."""
        version = self._hint()
        while self.is_committed(version + 1):
            version += 1
        return None if version < 0 else version

    def is_committed(self, version: int) -> bool:
        """True once the version's manifest exists."""
        return version in self._manifests or self.store.size(manifest_name(version)) is not None

    def manifest(self, version: int) -> Manifest:
        """Raises LogError, naming the file, when it is missing or malformed."""
        if version not in self._manifests:
            name = manifest_name(version)
            try:
                manifest = _read_manifest(self.store.get(name), name)
            except FileNotFoundError as error:
                raise LogError(str(error)) from error
            if manifest.version != version or manifest.run_id != self.run_id:
                raise LogError(
                    f"{name} is of run {manifest.run_id}, version {manifest.version}; "
                    f"expected run {self.run_id}"
                )
            if len(self._manifests) >= CACHED_MANIFESTS:
                self._manifests.clear()
            self._manifests[version] = manifest
        return self._manifests[version]

    def newest_anchor(self, at_most: int | None = None) -> int:
        """The newest version, `at_most` this one, that holds an anchor. Raises LogError."""
        version = self.head() if at_most is None else at_most
        for candidate in range(-1 if version is None else version, -1, -1):
            if self.manifest(candidate).anchor:
                return candidate
        raise LogError(f"the log at {self.url} holds no anchor up to version {version}")

    def next_version(self, live: int | None) -> int | None:
        """What to apply on `live` to get nearer to the head; None when it is the head.

        The next delta, or the newest anchor where the chain of deltas is broken.
        """
        head = self.head()
        if head is None or live == head:
            return None
        if live is None or any(not self.manifest(v).delta for v in range(live + 1, head + 1)):
            return self.newest_anchor(head)
        return live + 1

    def read_part(self, ref: PartRef) -> bytes:
        """The frame of a committed version. Raises LogError where it is missing or another."""
        try:
            data = self.store.get(ref.name)
        except FileNotFoundError as error:
            raise LogError(f"part of a committed version: {error}") from error
        if len(data) != ref.nbytes or frame_digest(data) != ref.hash:
            raise LogError(
                f"{ref.name} has {len(data)} bytes and digest {frame_digest(data)[:8]}; "
                f"its manifest says {ref.nbytes} and {ref.hash[:8]}"
            )
        return data

    def commit(self, manifest: Manifest) -> bool:
        """Creates the version; False, and nothing changed, where another writer already did."""
        text = json.dumps(asdict(manifest), sort_keys=True, indent=1)
        if not self.store.put(manifest_name(manifest.version), text.encode()):
            return False
        try:
            self.store.put("HEAD", str(manifest.version).encode(), overwrite=True)
        except OSError:
            pass  # the version exists; HEAD is only a hint
        return True

    def current_epoch(self) -> int:
        """The newest writer's epoch, 0 when none was claimed."""
        numbers = (re.fullmatch(r"epoch-(\d+)\.json", name) for name in self.store.list("epoch-"))
        return max((int(match[1]) for match in numbers if match), default=0)

    def is_superseded(self, epoch: int) -> bool:
        """True once a newer writer has claimed the log; claims leave no gap."""
        return self.store.size(epoch_name(epoch + 1)) is not None

    def claim_epoch(self) -> int:
        """Makes the caller the newest writer; older ones are stale from now on."""
        epoch = self.current_epoch() + 1
        claim = json.dumps({"claimed_s": time.time()}).encode()
        while not self.store.put(epoch_name(epoch), claim):
            epoch += 1
        return epoch

    def _hint(self) -> int:
        """A committed version, -1 when there is none."""
        try:
            hint = self.store.get("HEAD")
            if hint.isdigit() and self.is_committed(int(hint)):
                return int(hint)
        except FileNotFoundError:
            pass
        names = self.store.list("manifest-")
        return int(names[-1][len("manifest-") :].split(".")[0]) if names else -1


def manifest_name(version: int) -> str:
    """The file whose creation commits `version`."""
    return f"manifest-{version:08d}.json"


def epoch_name(epoch: int) -> str:
    """The file whose creation claims `epoch`."""
    return f"epoch-{epoch:04d}.json"


def part_name(version: int, writer_epoch: int, part: int, kind: str) -> str:
    """The file of one frame."""
    return f"parts/{version:08d}-e{writer_epoch:04d}-p{part}.{kind}"


def _read_manifest(data: bytes, name: str) -> Manifest:
    try:
        entry = json.loads(data)
        parts = {kind: [_read(PartRef, ref) for ref in entry[kind]] for kind in KINDS}
        return _read(Manifest, entry | parts)
    except KeyError as error:
        raise LogError(f"{name} lacks field {error}") from error
    except (ValueError, TypeError) as error:
        raise LogError(f"{name} is not a manifest: {error}") from error


def _read(kind: type[T], entry: dict[str, Any]) -> T:
    """A dataclass from JSON. Raises KeyError, or TypeError for a field of another type."""
    values = {}
    for field, expected in get_type_hints(kind).items():
        value = values[field] = entry[field]
        if not isinstance(value, list if get_origin(expected) is list else expected):
            raise TypeError(f"field {field} must not be {value!r}")
    return kind(**values)
