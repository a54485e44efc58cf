"""The bytes of one frame: one part of one version of the weights. Format only, no I/O.

The one idea: a frame explains itself. Its table says which rows of which tensors it holds, how each
is coded and with which probabilities, and a hash closes it; so a reader needs only the old values.

    header     little-endian, HEADER below
    table      zstd of JSON, below
    payload    the blocks' bytes, in the order of the table
    digest     blake2b-256 of everything before
    signature  Ed25519 over the digest, 64 bytes, where bit 0 of the header's flags is set

Table: {"run_id", "models", "families"}. A family is a set of runs whose names differ in numbers
only: "name" holds the pieces of text between the numbers, "axes" a list of numbers for each gap and
the names are their product, the last axis fastest (or "numbers" lists them, one tuple a run).
"dtype", "shape", "row_start" and "num_rows" hold for all of a family; "codecs", "counts" (elements
coded), "block_rows" and "models" (index, or null) have one entry a run, "nbytes" one a block. Block
i of a run holds its rows [i block_rows, (i + 1) block_rows), flat; a vector is one row; a block of
0 bytes did not change. Where a delta lacks a run, nothing of it changed.

A replica's message of a round is of kind `outer` and has one more entry, "about"; what that holds,
and codec `topk`, is told in outer/message.py and outer/sparse.py.

Codec `dense`: every pattern of the block, a plane for each byte, low one first (codec/planes.py).
Codec `planes`: gaps and steps as byte planes (codec/step.py). Codec `entropy`: the class prefix of
an element is its old pattern >> shift (codec/elements.py), its class the prefix without the sign
for floats. A model has
for class first, first + 1, ... the index of a length in hazard.LENGTHS and the frequencies, out of
4096, of step symbols; lower classes count as first, higher ones never change. A block is one
rANS stream (scales 2**36 and 2**12, state refilled below 2**47 by little-endian 16-bit words, first
byte alone where their number is odd, final state 1). Elements are taken in words of four. Starting
at 0, a word's lengths are added up; if the distribution function (hazard.CUMULATIVE, linear between
nodes) at some element's end exceeds the state's low 36 bits, the first such element changed: its
symbol is [F(its begin), F(its end)), and lengths count from its end on. A full word that ends at
hazard.WINDOW or more is left by the symbol [F(end), 2**36) and counting starts at 0; so is the
block. Behind each change its step is coded: z = zigzag(step) - 1, step being the difference in the
order of values, away from zero counted upwards for floats; symbol z below 24, else 24 + e with
z - 23 in [2**e, 2**(e + 1)) and e raw bits, at most 16 at a time, high ones first.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zstandard
from gossamer.comm.run import Run, WireError
from gossamer.comm.table import in_families, read_table, write_table

DIGEST_BYTES = 32
SIGNATURE_BYTES = 64
KINDS = ("delta", "anchor", "outer")
VERSION_KINDS = KINDS[:2]
"""Of the weight log; the other is a replica's message of a round (outer/message.py)."""
MAGIC = b"GSMR"
WIRE_VERSION = 2
NO_BASE = 2**64 - 1
SIGNED_FLAG = 1
MAX_TABLE_BYTES = 2**28
# magic, wire version, kind, flags, part, num_parts, writer epoch, version, base, hash of the base,
# step, num_changed, hash gain, num_runs, table bytes before and after zstd, payload bytes
HEADER = struct.Struct("<4sHBBIIIQQQQQQIIIQ")


@dataclass(frozen=True, slots=True)
class Frame:
    """One part of one version."""

    kind: str
    run_id: str
    version: int
    base_version: int | None
    base_state_hash: str | None
    """Hash of the whole state that a delta goes on."""
    step: int
    writer_epoch: int
    part: int
    num_parts: int
    num_changed: int
    hash_gain: int
    """What this part adds to the hash of the whole state, mod 2**64 (state_hash.py)."""
    runs: list[Run]
    about: dict[str, Any] | None = None
    """What a message says beside its runs, JSON; None in a version."""


def pack_frame(frame: Frame, sign: Callable[[bytes], bytes] | None = None) -> bytes:
    """The frame's bytes, signed by `sign(digest)` where it is given."""
    runs = in_families(frame.runs)
    table = write_table(frame.run_id, runs)
    if frame.about is not None:
        table["about"] = frame.about
    raw = json.dumps(table, separators=(",", ":")).encode()
    packed = zstandard.ZstdCompressor(level=9).compress(raw)
    header = HEADER.pack(
        MAGIC,
        WIRE_VERSION,
        KINDS.index(frame.kind),
        SIGNED_FLAG if sign else 0,
        frame.part,
        frame.num_parts,
        frame.writer_epoch,
        frame.version,
        NO_BASE if frame.base_version is None else frame.base_version,
        int(frame.base_state_hash or "0", 16),
        frame.step,
        frame.num_changed,
        frame.hash_gain,
        len(runs),
        len(raw),
        len(packed),
        sum(len(run.payload) for run in runs),
    )
    body = b"".join([header, packed, *(run.payload for run in runs)])
    digest = hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
    return body + digest + (sign(digest) if sign else b"")


def frame_digest(data: bytes) -> str:
    """The hash that a frame carries, in hex; of anything shorter than a header, its end."""
    end = len(data) - (SIGNATURE_BYTES if _is_signed(data) else 0)
    return data[end - DIGEST_BYTES : end].hex()


def frame_signature(data: bytes) -> bytes | None:
    """The signature that a frame carries, over its digest; None where it has none."""
    return data[-SIGNATURE_BYTES:] if _is_signed(data) else None


def _is_signed(data: bytes) -> bool:
    return len(data) >= HEADER.size + SIGNATURE_BYTES and bool(data[7] & SIGNED_FLAG)


def head_nbytes(header: bytes) -> int:
    """Length of header and table, from the header alone. Raises WireError."""
    return HEADER.size + _read_header(header)[15]


def unpack_head(data: bytes) -> Frame:
    """The frame that begins with `data`, runs without payloads; no hash is checked.

    `data` holds at least header and table. Raises WireError.
    """
    return _unpack(data, _read_header(data), b"")


def unpack_frame(data: bytes, kinds: tuple[str, ...] = VERSION_KINDS) -> Frame:
    """Reads and checks a frame, but for its signature; runs' payloads are views on `data`.

    Raises WireError, also for a frame that is none of `kinds`.
    """
    fields = _read_header(data, kinds)
    flags, table_nbytes, payload_nbytes = fields[3], fields[15], fields[16]
    payload_at = HEADER.size + table_nbytes
    end = payload_at + payload_nbytes
    promised = end + DIGEST_BYTES + (SIGNATURE_BYTES if flags & SIGNED_FLAG else 0)
    _expect(len(data) == promised, f"{len(data)} bytes where its header promises {promised}")
    view = memoryview(data)
    digest = hashlib.blake2b(view[:end], digest_size=DIGEST_BYTES).digest()
    _expect(digest == view[end : end + DIGEST_BYTES], "its bytes do not match its digest")
    return _unpack(data, fields, view[payload_at:end])


def _expect(good: bool, what: str) -> None:
    if not good:
        raise WireError(f"not a sound frame: {what}")


def _read_header(data: bytes, kinds: tuple[str, ...] = VERSION_KINDS) -> tuple:
    _expect(len(data) >= HEADER.size, f"{len(data)} bytes are less than a header")
    fields = HEADER.unpack_from(data)
    magic, wire_version, kind, flags, part, num_parts = fields[:6]
    _expect(magic == MAGIC, f"it begins with {magic!r} instead of {MAGIC!r}")
    _expect(wire_version == WIRE_VERSION, f"wire version {wire_version} is not {WIRE_VERSION}")
    _expect(kind < len(KINDS), f"kind {kind} is unknown")
    _expect(KINDS[kind] in kinds, f"it is of kind {KINDS[kind]}, not {' or '.join(kinds)}")
    _expect(flags <= SIGNED_FLAG, f"flags {flags} are unknown")
    _expect(part < num_parts, f"it is part {part} of {num_parts}")
    return fields


def _unpack(data: bytes, fields: tuple, payload: bytes | memoryview) -> Frame:
    _, _, kind, _, part, num_parts, epoch, version, base, base_hash = fields[:10]
    step, num_changed, hash_gain, num_runs, raw_nbytes, table_nbytes, payload_nbytes = fields[10:]
    table = memoryview(data)[HEADER.size : HEADER.size + table_nbytes]
    _expect(len(table) == table_nbytes, "its table is cut")
    entry = _unpack_table(table, raw_nbytes)
    run_id, runs = read_table(entry, num_runs, payload_nbytes, payload)
    return Frame(
        kind=KINDS[kind],
        run_id=run_id,
        version=version,
        base_version=None if base == NO_BASE else base,
        base_state_hash=None if base == NO_BASE else f"{base_hash:016x}",
        step=step,
        writer_epoch=epoch,
        part=part,
        num_parts=num_parts,
        num_changed=num_changed,
        hash_gain=hash_gain,
        runs=runs,
        about=entry.get("about"),
    )


def _unpack_table(packed: memoryview, raw_nbytes: int) -> Any:  # noqa: ANN401
    try:
        _expect(
            zstandard.frame_content_size(packed) == raw_nbytes <= MAX_TABLE_BYTES,
            f"its table does not unpack to {raw_nbytes} bytes",
        )
        return json.loads(zstandard.ZstdDecompressor().decompress(packed))
    except (zstandard.ZstdError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WireError(f"not a sound frame: its table is unreadable ({error})") from error
