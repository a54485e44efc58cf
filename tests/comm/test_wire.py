import dataclasses
import hashlib
import json

import pytest
import zstandard
from gossamer.comm.codec.kernels import NUM_STEP_SYMBOLS
from gossamer.comm.run import Model, Run, WireError, overlap, uncovered
from gossamer.comm.wire import (
    DIGEST_BYTES,
    HEADER,
    MAX_TABLE_BYTES,
    Frame,
    frame_digest,
    frame_signature,
    head_nbytes,
    pack_frame,
    unpack_frame,
    unpack_head,
)
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = Model(118, (90, 0, 40), (7, 0, 2), ((4096,), (), (2000, 2096)))
RUNS = [
    Run("b", "float32", (5,), 0, 1, "dense", 5, 64, (20,), bytes(range(20))),
    Run("layers.7.v", "bfloat16", (9,), 0, 1, "planes", 2, 64, (4,), b"efgh"),
    *(
        Run(f"layers.{i}.w.{j}", "bfloat16", (200, 8), 64, 130, "entropy", 9, 64, (3, 0, 1),
            b"abcd", MODEL)
        for i in range(2) for j in (0, 3)
    ),
]  # fmt: skip
FRAME = Frame("delta", "run-1", 12, 11, "00000000000000ab", 340, 2, 1, 4, 43, 2**64 - 1, RUNS)
DATA = pack_frame(FRAME)


def closed(body):
    """`body` as a forger would close it: with a digest that is right."""
    return body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def with_table(change, raw_nbytes=None):
    """FRAME with its table changed by `change`, lengths and digest made right again."""
    fields = list(HEADER.unpack_from(DATA))
    end = HEADER.size + fields[15]
    table = json.loads(zstandard.decompress(DATA[HEADER.size : end]))
    table = change(table) or table
    raw = json.dumps(table).encode()
    packed = zstandard.compress(raw)
    fields[14:16] = [len(raw) if raw_nbytes is None else raw_nbytes, len(packed)]
    return closed(HEADER.pack(*fields) + packed + DATA[end:-DIGEST_BYTES])


def test_a_frame_comes_back():
    assert unpack_frame(DATA) == FRAME
    first = dataclasses.replace(
        FRAME, kind="anchor", base_version=None, base_state_hash=None, runs=[]
    )
    assert unpack_frame(pack_frame(first)) == first
    assert frame_digest(DATA) == DATA[-DIGEST_BYTES:].hex() and frame_signature(DATA) is None


def test_a_signature_lies_behind_the_digest():
    data = pack_frame(FRAME, lambda digest: digest * 2)
    assert frame_signature(data) == bytes.fromhex(frame_digest(data)) * 2
    assert unpack_frame(data) == FRAME
    with pytest.raises(WireError):
        unpack_frame(data[:-64])
    with pytest.raises(WireError, match="bytes where its header promises"):
        unpack_frame(DATA + bytes(64))


def test_the_head_alone_tells_all_but_the_payload():
    nbytes = head_nbytes(DATA[: HEADER.size])
    head = unpack_head(DATA[:nbytes])
    assert head.hash_gain == FRAME.hash_gain and head.num_changed == 43
    assert [(run.name, run.block_nbytes, run.model) for run in head.runs] == [
        (run.name, run.block_nbytes, run.model) for run in RUNS
    ]
    assert all(not run.payload for run in head.runs)
    with pytest.raises(WireError, match="its table is cut"):
        unpack_head(DATA[: nbytes - 1])


def test_names_come_back_whatever_their_numbers():
    names = ["a.0.b", "a.1.b", "a.01.b", "10", "a.0.b.12345678901", "x2y3z", "x2y4z", "x3y3z", ""]
    runs = [Run(name, "int8", (4,), 0, 1, "dense", 4, 64, (1,), b"x") for name in names]
    found = unpack_frame(pack_frame(dataclasses.replace(FRAME, runs=runs))).runs
    assert sorted(run.name for run in found) == sorted(names)


def test_many_alike_runs_cost_a_few_bytes_each():
    names = [
        f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(8) for j in range(64)
    ]
    runs = [
        Run(name, "bfloat16", (64, 64), 0, 64, "entropy", 40 + i % 7, 64, (30 + i % 9,),
            bytes(30 + i % 9), MODEL)
        for i, name in enumerate(names)
    ]  # fmt: skip
    data = pack_frame(dataclasses.replace(FRAME, runs=runs))
    assert len(data) - sum(len(run.payload) for run in runs) < 3 * len(runs)


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
@given(field=st.integers(2, 16), value=st.sampled_from([0, 1, 2, 5, 77, 2**16 - 1, 2**31, 2**62]))
def test_forged_headers_with_a_right_digest_are_refused_or_read(field, value):
    fields = list(HEADER.unpack_from(DATA))
    fields[field] = value % 2**8 if field in (2, 3) else value
    try:
        header = HEADER.pack(*fields)
    except Exception:
        return  # the value does not fit its field
    body = header + DATA[HEADER.size : -DIGEST_BYTES]
    is_length = field >= 13
    if is_length and body != DATA[:-DIGEST_BYTES]:
        with pytest.raises(WireError):
            unpack_frame(closed(body))
    else:
        try:
            assert len(unpack_frame(closed(body)).runs) == len(RUNS)
        except WireError:
            pass


def test_forged_tables_with_a_right_digest_are_refused():
    def family(**entries):
        return lambda table: table["families"][2].update(entries)

    def model(**entries):
        return lambda table: table["models"][0].update(entries)

    forged = {
        "shape": family(shape=[200, -8]),
        "out of bounds": family(shape=[200, 2**50]),
        "leave its shape": family(num_rows=137),
        "rows of layers.0.w.0 must be counts": family(row_start=-64),
        "dtype": family(dtype="object"),
        "dtype of its table must be of type str": family(dtype=["bfloat16"]),
        "a name must be strings": family(name=[None]),
        "axes of": family(name=["a"]),
        "more runs than its header": family(axes=[list(range(1000)), list(range(1000))]),
        "must have 4 entries": family(counts=[9]),
        "codes 0 of 1040": family(counts=[0] * 4),
        "codes 1041 of 1040": family(counts=[1041] * 4),
        "whole bands": family(block_rows=[65] * 4),
        "model 1 of layers.0.w.0 is not one of 1": family(models=[1] * 4),
        "leave the payload": family(nbytes=[24] * 12),
        "payload bytes": family(nbytes=[0] * 12),
        "2 of 3 blocks": family(nbytes=[1] * 11),
        "nbytes of layers.0.w.0 has 13 entries": family(nbytes=[1] * 13),
        "codec of layers.0.w.0": family(codecs=[1] * 4),
        "2 runs where": lambda table: table["families"].pop(2) and None,
        "run_id": lambda table: table.update(run_id=3),
        "must be an object": lambda table: [table],
        "families of its table": lambda table: table.update(families={}),
        "first of its table": model(first="a"),
        "one a class": model(counts=[1]),
        "length 190 of a model": model(lengths=[190, 0, 1]),
        "add up to 4096": model(steps=[[4095], [], [4096]]),
        "add up to 4096 ": model(steps=[[0] * NUM_STEP_SYMBOLS + [4096], [], [4096]]),
    }
    for message, change in forged.items():
        with pytest.raises(WireError, match=message.strip()):
            unpack_frame(with_table(change))


def test_a_table_that_would_fill_memory_is_refused():
    for raw_nbytes in (1, MAX_TABLE_BYTES + 1):
        with pytest.raises(WireError, match="does not unpack"):
            unpack_frame(with_table(lambda table: None, raw_nbytes))


def test_gaps_overlaps_and_missing_ends_are_named():
    def rows(start, count):
        return Run("w", "bfloat16", (200, 8), start, count)

    vector = Run("b", "bfloat16", (5,), 0, 1)
    assert uncovered([rows(64, 136), vector, rows(0, 64)]) is None
    assert uncovered([rows(0, 64), rows(128, 72)]) == "w has rows up to 64, then rows from 128"
    assert uncovered([rows(0, 128), rows(64, 136)]) == "w has rows up to 128, then rows from 64"
    assert uncovered([rows(0, 128)]) == "w has rows up to 128 of 200"
    assert uncovered([rows(64, 136)]) == "w has rows up to 0, then rows from 64"
    assert overlap([rows(64, 136), vector, rows(0, 60)]) is None
    assert overlap([rows(0, 128), rows(64, 136)]) == "w has rows up to 128, then rows from 64"
