"""What a version is, as a file: its parts, its parent, and what the whole state hashes to.

The one idea: a manifest names its parts by their digests and its parent by the hash of the parent's
file, so the newest one vouches for everything that is still in the log.

The file is JSON. A signature is a field of it, over the rest as canonical JSON (sorted keys, no
blanks). A fold is a manifest too: one delta over several versions, under a name of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

from gossamer.comm.wire import VERSION_KINDS

if TYPE_CHECKING:
    from gossamer.comm.signing import Signer, Verifier

T = TypeVar("T")

# what the names below look like: (version, writer epoch), and (first, last) of a fold
PART = r"parts/(\d+)-e(\d+)-p\d+\.\w+"
FOLD_PART = r"parts/fold-(\d+)-(\d+)-\w+\.delta"


class LogError(RuntimeError):
    """A log that is missing, of another run, or damaged."""


class GoneError(LogError):
    """A file that is not there: never was, or deleted since as too old (retention.py)."""


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
    parent_version: int | None
    """The version before this one; None for the first. A fold's is the version that it goes on."""
    parent_state_hash: str | None
    parent_hash: str | None
    """blake2b-256, hex, of the parent's manifest file."""
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


def manifest_name(version: int) -> str:
    """The file whose creation commits `version`."""
    return f"manifest-{version:08d}.json"


def fold_name(first: int, last: int) -> str:
    """The manifest of the delta from version `first` to version `last`."""
    return f"fold-{first:08d}-{last:08d}.json"


def epoch_name(epoch: int) -> str:
    """The file whose creation claims `epoch`."""
    return f"epoch-{epoch:04d}.json"


def part_name(version: int, writer_epoch: int, part: int, kind: str) -> str:
    """The file of one frame."""
    return f"parts/{version:08d}-e{writer_epoch:04d}-p{part}.{kind}"


def fold_part_name(first: int, last: int, digest: str) -> str:
    """The file of a fold's frame; another attempt with other bytes gets another name."""
    return f"parts/fold-{first:08d}-{last:08d}-{digest[:16]}.delta"


def numbers_in(name: str, pattern: str) -> tuple[int, ...] | None:
    """The groups of `pattern` in the file name, as numbers; None where it is another file."""
    match = re.fullmatch(pattern, name)
    return tuple(map(int, match.groups())) if match else None


def total_bytes(refs: list[PartRef]) -> int:
    """Bytes of these frames together."""
    return sum(ref.nbytes for ref in refs)


def file_hash(data: bytes) -> str:
    """What a child calls its parent's file: blake2b-256 in hex."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def pack_manifest(manifest: Manifest, signer: Signer | None = None) -> bytes:
    """The file's bytes, signed if there is a signer."""
    entry = asdict(manifest)
    if signer is not None:
        entry["signature"] = signer.sign(_canonical(entry)).hex()
    return json.dumps(entry, sort_keys=True, indent=1).encode()


def unpack_manifest(data: bytes, name: str, verifier: Verifier | None = None) -> Manifest:
    """Reads the file `name`. Raises LogError; SignatureError unless `verifier`, if any, agrees."""
    try:
        entry = json.loads(data)
        signature = entry.pop("signature", None)
        if verifier is not None:
            verifier.check(
                _canonical(entry), None if signature is None else bytes.fromhex(signature), name
            )
        parts = {kind: [_read(PartRef, ref) for ref in entry[kind]] for kind in VERSION_KINDS}
        return _read(Manifest, entry | parts)
    except KeyError as error:
        raise LogError(f"{name} lacks field {error}") from error
    except LogError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LogError(f"{name} is not a manifest: {error}") from error


def _canonical(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()


def _read(kind: type[T], entry: dict[str, Any]) -> T:
    """A dataclass from JSON. Raises KeyError, or TypeError for a field of another type."""
    values = {}
    for field, expected in get_type_hints(kind).items():
        value = values[field] = entry[field]
        if not isinstance(value, list if get_origin(expected) is list else expected):
            raise TypeError(f"field {field} must not be {value!r}")
    return kind(**values)
