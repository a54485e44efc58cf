"""The bytes of one frame: one part of one version of the weights. Format only, no I/O.

The one idea: a frame explains itself. Its table says which rows of which tensors it holds, in
blocks of at most 64 rows that decode one by one, and its last 32 bytes are a hash of the rest.

    header    little-endian, HEADER below; base is 2**64 - 1 for an anchor
    table     zstd of JSON {"run_id", "runs": [{"name", "dtype", "shape", "row_start", "num_rows",
              "codecs", "indices", "counts", "nbytes"}]}, the last four one entry a block
    hash sums one u64 a run: what the run adds to its tensor's hash (see state_hash.py), mod 2**64
    payload   the blocks' bytes, in the order of the table
    digest    blake2b-256 of everything before

Block i of a run holds its rows [64 i, 64 (i + 1)); a delta lists only blocks that changed. A
vector is one row. The hash sums stay outside of the zstd, so that a delta whose blocks all fell
back to `dense` has exactly the size of the anchor.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
}
BLOCK_ROWS = 64
DIGEST_BYTES = 32
KINDS = ("delta", "anchor")
MAGIC = b"GSMR"
WIRE_VERSION = 1
NO_BASE = 2**64 - 1
MAX_TABLE_BYTES = 2**28
RUN_KEYS = ("name", "dtype", "shape", "row_start", "num_rows")
BLOCK_KEYS = ("codecs", "indices", "counts", "nbytes")
# magic, wire version, kind, part, num_parts, writer epoch, version, base, step, num_changed,
# num_runs, table bytes before and after zstd, payload bytes
HEADER = struct.Struct("<4sHHIIIQQQQIIIQ")


class WireError(ValueError):
    """A frame that is cut, flipped or forged."""


@dataclass(frozen=True, slots=True)
class Block:
    """Changes in at most 64 rows of a run; decodes from its own old values alone."""

    codec: str
    index: int
    """Its place in the run: rows [64 index, 64 (index + 1))."""
    count: int
    """Elements that the payload codes: the changed ones, or all of a dense block."""
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Run:
    """Rows [row_start, row_start + num_rows) of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_start: int
    num_rows: int
    hash_sum: int
    """What the run adds to its tensor's hash: new less old, or all of the new for an anchor."""
    blocks: list[Block]

    @property
    def row_elements(self) -> int:
        """Elements in one row; a vector (or a scalar) is one row."""
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)

    @property
    def start(self) -> int:
        """Flat index of the first element in the tensor."""
        return self.row_start * self.row_elements

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.row_elements

    @property
    def block_elements(self) -> int:
        return BLOCK_ROWS * self.row_elements


@dataclass(frozen=True, slots=True)
class Frame:
    """One part of one version."""

    kind: str
    run_id: str
    version: int
    base_version: int | None
    step: int
    writer_epoch: int
    part: int
    num_parts: int
    num_changed: int
    runs: list[Run]


def pack_frame(frame: Frame) -> bytes:
    """The frame's bytes; `frame_digest` of them names the frame."""
    table = {
        "run_id": frame.run_id,
        "runs": [
            {
                "name": run.name,
                "dtype": run.dtype,
                "shape": run.shape,
                "row_start": run.row_start,
                "num_rows": run.num_rows,
                "codecs": [block.codec for block in run.blocks],
                "indices": [block.index for block in run.blocks],
                "counts": [block.count for block in run.blocks],
                "nbytes": [len(block.payload) for block in run.blocks],
            }
            for run in frame.runs
        ],
    }
    raw = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    packed = zstandard.ZstdCompressor(level=3).compress(raw)
    payloads = [block.payload for run in frame.runs for block in run.blocks]
    header = HEADER.pack(
        MAGIC,
        WIRE_VERSION,
        KINDS.index(frame.kind),
        frame.part,
        frame.num_parts,
        frame.writer_epoch,
        frame.version,
        NO_BASE if frame.base_version is None else frame.base_version,
        frame.step,
        frame.num_changed,
        len(frame.runs),
        len(raw),
        len(packed),
        sum(map(len, payloads)),
    )
    sums = np.array([run.hash_sum for run in frame.runs], "<u8").tobytes()
    body = b"".join([header, packed, sums, *payloads])
    return body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def frame_digest(data: bytes) -> str:
    """The hash that a frame carries, in hex."""
    return data[-DIGEST_BYTES:].hex()


def unpack_frame(data: bytes) -> Frame:
    """Reads and checks a frame; the blocks' payloads are views on `data`. Raises WireError."""
    _expect(len(data) >= HEADER.size + DIGEST_BYTES, f"{len(data)} bytes are less than a header")
    fields = HEADER.unpack_from(data)
    magic, wire_version, kind, part, num_parts, epoch, version, base = fields[:8]
    step, num_changed, num_runs, raw_nbytes, table_nbytes, payload_nbytes = fields[8:]
    _expect(magic == MAGIC, f"it begins with {magic!r} instead of {MAGIC!r}")
    _expect(wire_version == WIRE_VERSION, f"wire version {wire_version} is not {WIRE_VERSION}")
    sums_at = HEADER.size + table_nbytes
    payload_at = sums_at + 8 * num_runs
    promised = payload_at + payload_nbytes + DIGEST_BYTES
    _expect(len(data) == promised, f"{len(data)} bytes where its header promises {promised}")
    view = memoryview(data)
    digest = hashlib.blake2b(view[:-DIGEST_BYTES], digest_size=DIGEST_BYTES).digest()
    _expect(digest == view[-DIGEST_BYTES:], "its bytes do not match its digest")
    _expect(kind < len(KINDS), f"kind {kind} is unknown")
    _expect(part < num_parts, f"it is part {part} of {num_parts}")
    run_id, entries = _read_table(view[HEADER.size : sums_at], raw_nbytes)
    _expect(len(entries) == num_runs, f"{len(entries)} runs where its header promises {num_runs}")
    sums = np.frombuffer(data, "<u8", num_runs, sums_at).tolist()
    payload = view[payload_at:-DIGEST_BYTES]
    runs, taken = [], 0
    for entry, hash_sum in zip(entries, sums, strict=True):
        run, taken = _read_run(entry, hash_sum, payload, taken)
        runs.append(run)
    _expect(taken == payload_nbytes, f"its blocks hold {taken} of {payload_nbytes} payload bytes")
    base_version = None if base == NO_BASE else base
    return Frame(
        KINDS[kind], run_id, version, base_version, step, epoch, part, num_parts, num_changed, runs
    )


def uncovered(runs: list[Run]) -> str | None:
    """What keeps `runs` from holding every row of their tensors exactly once, or None."""
    stops: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.name, run.row_start)):
        last = stops.get(run.name)
        stop = last.row_start + last.num_rows if last else 0
        if run.row_start != stop:
            return f"{run.name} has rows up to {stop}, then rows from {run.row_start}"
        stops[run.name] = run
    for run in stops.values():
        stop, rows = run.row_start + run.num_rows, _num_rows(run.shape)
        if stop != rows:
            return f"{run.name} has rows up to {stop} of {rows}"
    return None


def _expect(good: bool, what: str) -> None:
    if not good:
        raise WireError(f"not a sound frame: {what}")


def _num_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _read_table(packed: memoryview, raw_nbytes: int) -> tuple[str, list[dict[str, Any]]]:
    try:
        _expect(
            zstandard.frame_content_size(packed) == raw_nbytes <= MAX_TABLE_BYTES,
            f"its table does not unpack to {raw_nbytes} bytes",
        )
        table = json.loads(zstandard.ZstdDecompressor().decompress(packed))
        run_id, entries = table["run_id"], table["runs"]
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"not a sound frame: its table is unreadable ({error})") from error
    _expect(isinstance(run_id, str), "run_id of its table must be a string")
    _expect(isinstance(entries, list), "runs of its table must be a list")
    for entry in entries:
        _expect(isinstance(entry, dict), "a run of its table must be an object")
    keys = (*RUN_KEYS, *BLOCK_KEYS)
    return run_id, [{key: entry.get(key) for key in keys} for entry in entries]


def _read_run(
    entry: dict[str, Any], hash_sum: int, payload: memoryview, taken: int
) -> tuple[Run, int]:
    """The run that `entry` of the table describes, and the payload bytes taken so far."""
    name, dtype, shape, row_start, num_rows = (entry[key] for key in RUN_KEYS)
    columns = [entry[key] for key in BLOCK_KEYS]
    _expect(isinstance(name, str), "name of a run must be a string")
    _expect(
        isinstance(dtype, str) and dtype in DTYPE_BYTES, f"dtype {dtype!r} of {name} is unknown"
    )
    _expect(_are_naturals(shape), f"shape {shape} of {name} must be a list of counts")
    _expect(_are_naturals([row_start, num_rows]), f"rows of {name} must be counts")
    run = Run(name, dtype, tuple(shape), row_start, num_rows, hash_sum, [])
    _expect(0 < num_rows <= _num_rows(run.shape) - row_start, f"rows of {name} leave its shape")
    _expect(0 < run.num_elements < 2**40, f"shape {shape} of {name} is out of bounds")
    _expect(
        all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        and all(map(_are_naturals, columns[1:])),
        f"blocks of {name} must be four lists of one length",
    )
    last = -1
    num_blocks = -(-num_rows // BLOCK_ROWS)
    for codec, index, count, nbytes in zip(*columns, strict=True):
        _expect(isinstance(codec, str), f"a codec of {name} must be a string")
        _expect(last < index < num_blocks, f"block {index} of {name} is out of place")
        size = min(run.num_elements - index * run.block_elements, run.block_elements)
        _expect(0 < count <= size, f"block {index} of {name} codes {count} of {size} elements")
        _expect(nbytes <= len(payload) - taken, f"block {index} of {name} leaves the payload")
        run.blocks.append(Block(codec, index, count, payload[taken : taken + nbytes]))
        taken += nbytes
        last = index
    return run, taken


def _are_naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
