import dataclasses
import hashlib
import json

import numpy as np
import pytest
import zstandard
from gossamer.comm.codec.runs import RunCodec
from gossamer.comm.wire import (
    DIGEST_BYTES,
    HEADER,
    MAX_TABLE_BYTES,
    Block,
    Frame,
    Run,
    WireError,
    pack_frame,
    uncovered,
    unpack_frame,
)
from hypothesis import given, settings
from hypothesis import strategies as st

RUNS = [
    Run("w", "bfloat16", (200, 8), 64, 130, 2**64 - 1, [Block("step", 0, 9, b"abc")]),
    Run("b", "float32", (5,), 0, 1, 7, [Block("dense", 0, 5, bytes(range(20)))]),
]
FRAME = Frame("delta", "run-1", 12, 11, 340, 2, 1, 4, 14, RUNS)
DATA = pack_frame(FRAME)


def signed(body):
    """`body` as a forger would close it: with a digest that is right."""
    return body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def with_table(change, raw_nbytes=None):
    """FRAME with its table changed by `change`, lengths and digest made right again."""
    fields = list(HEADER.unpack_from(DATA))
    end = HEADER.size + fields[12]
    table = json.loads(zstandard.decompress(DATA[HEADER.size : end]))
    table = change(table) or table
    raw = json.dumps(table).encode()
    packed = zstandard.compress(raw)
    fields[11:13] = [len(raw) if raw_nbytes is None else raw_nbytes, len(packed)]
    return signed(HEADER.pack(*fields) + packed + DATA[end:-DIGEST_BYTES])


def test_a_frame_comes_back():
    assert unpack_frame(DATA) == FRAME
    first = dataclasses.replace(FRAME, kind="anchor", base_version=None, runs=[])
    assert unpack_frame(pack_frame(first)) == first


@settings(deadline=None, max_examples=300)
@given(place=st.integers(0, len(DATA) - 1), mask=st.integers(1, 255))
def test_any_flipped_byte_is_refused(place, mask):
    broken = bytearray(DATA)
    broken[place] ^= mask
    with pytest.raises(WireError, match="^not a sound frame: .*$"):
        unpack_frame(bytes(broken))


def test_every_cut_and_every_tail_is_refused():
    for length in range(len(DATA)):
        with pytest.raises(WireError):
            unpack_frame(DATA[:length])
    with pytest.raises(WireError, match=f"{len(DATA) + 1} bytes where its header promises"):
        unpack_frame(DATA + b"\0")


@settings(deadline=None, max_examples=300)
@given(field=st.integers(2, 13), value=st.sampled_from([0, 1, 2, 5, 77, 2**16 - 1, 2**31, 2**62]))
def test_forged_headers_with_a_right_digest_are_refused_or_read(field, value):
    fields = list(HEADER.unpack_from(DATA))
    fields[field] = value % 2**16 if field == 2 else value
    try:
        header = HEADER.pack(*fields)
    except Exception:
        return  # the value does not fit its field
    body = header + DATA[HEADER.size : -DIGEST_BYTES]
    is_length = field >= 10
    if is_length and body != DATA[:-DIGEST_BYTES]:
        with pytest.raises(WireError):
            unpack_frame(signed(body))
    else:
        try:
            assert len(unpack_frame(signed(body)).runs) == len(RUNS)
        except WireError:
            pass


def test_forged_tables_with_a_right_digest_are_refused():
    def set_run(**entries):
        return lambda table: table["runs"][0].update(entries)

    forged = {
        "shape": set_run(shape=[200, -8]),
        "out of bounds": set_run(shape=[200, 2**50]),
        "leave its shape": set_run(num_rows=137),
        "rows of w must be counts": set_run(row_start=-64),
        "dtype": set_run(dtype="object"),
        r"dtype \['bfloat16'\]": set_run(dtype=["bfloat16"]),
        "name of a run": set_run(name=None),
        "out of place": set_run(indices=[3]),
        "codes 0 of 512": set_run(counts=[0]),
        "codes 513 of 512": set_run(counts=[513]),
        "leaves the payload": set_run(nbytes=[24]),
        "payload bytes": set_run(nbytes=[2]),
        "four lists": set_run(nbytes=[3, 0]),
        "codec of w": set_run(codecs=[1]),
        "1 runs where": lambda table: table.update(runs=table["runs"][:1]),
        "run_id": lambda table: table.update(run_id=3),
        "unreadable": lambda table: [table],
        "must be a list": lambda table: table.update(runs={}),
        "must be an object": lambda table: table.update(runs=[1, 2]),
    }
    for message, change in forged.items():
        with pytest.raises(WireError, match=message):
            unpack_frame(with_table(change))


def test_a_table_that_would_fill_memory_is_refused():
    for raw_nbytes in (1, MAX_TABLE_BYTES + 1):
        with pytest.raises(WireError, match="does not unpack"):
            unpack_frame(with_table(lambda table: None, raw_nbytes))


@settings(deadline=None)
@given(data=st.data())
def test_flips_under_a_right_digest_never_end_in_another_error(data):
    old = np.zeros(1040, np.uint16)
    new = old.copy()
    new[::5] = 3
    run = Run("w", "bfloat16", (200, 8), 64, 130, 5, [])
    blocks = RunCodec().encode_changes(run, old, new, np.flatnonzero(new))
    frame = dataclasses.replace(FRAME, runs=[dataclasses.replace(run, blocks=blocks)])
    body = bytearray(pack_frame(frame)[:-DIGEST_BYTES])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        for each in unpack_frame(signed(bytes(body))).runs:
            if each.dtype == "bfloat16" and each.num_elements == len(old):
                RunCodec().decode(each, old)
    except WireError:
        pass


def test_gaps_overlaps_and_missing_ends_are_named():
    def rows(start, count):
        return Run("w", "bfloat16", (200, 8), start, count, 0, [])

    vector = Run("b", "bfloat16", (5,), 0, 1, 0, [])
    assert uncovered([rows(64, 136), vector, rows(0, 64)]) is None
    assert uncovered([rows(0, 64), rows(128, 72)]) == "w has rows up to 64, then rows from 128"
    assert uncovered([rows(0, 128), rows(64, 136)]) == "w has rows up to 128, then rows from 64"
    assert uncovered([rows(0, 128)]) == "w has rows up to 128 of 200"
    assert uncovered([rows(64, 136)]) == "w has rows up to 0, then rows from 64"
