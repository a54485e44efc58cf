"""Vectors against plain loops."""

import os
import subprocess
import sys

import numpy as np
import pytest
from gossamer.comm.codec.coder import skip, sum_lengths
from gossamer.comm.codec.elements import ELEMENTS, class_of_prefix
from gossamer.comm.codec.hazard import LENGTHS
from gossamer.comm.codec.lanes import HAS_LOOKUP, STRIDE, build_line, find_changes
from hypothesis import given, settings
from hypothesis import strategies as st

BITS = {
    dtype: np.dtype(f"uint{(2 * sign).bit_length() - 1}")
    for dtype, (_, _, sign) in ELEMENTS.items()
}


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    size=st.integers(0, 300),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    room=st.integers(64, 400),
    seed=st.integers(0, 2**16),
)
def test_changes_are_found_in_as_many_calls_as_there_is_room(bits, size, share, room, seed):
    random = np.random.default_rng(seed)
    old = random.integers(0, 256, size).astype(bits)
    new = np.where(random.random(size) < share, old + bits(1), old)
    at, pieces = 0, []
    while at < size:
        found = np.zeros(room, np.uint32), np.zeros(room, bits), np.zeros(room, bits)
        count, at = find_changes(old, new, at, found)
        pieces.append([part[: int(count)] for part in found])
    expected = np.flatnonzero(old != new)
    if pieces:
        positions, before, after = map(np.concatenate, zip(*pieces, strict=True))
        assert np.array_equal(positions, expected)
        assert np.array_equal(before, old[expected]) and np.array_equal(after, new[expected])


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(sorted(ELEMENTS)),
    num_classes=st.integers(1, STRIDE + 3),
    longest=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_lengths_add_up_by_table_and_by_prefix(dtype, num_classes, longest, seed):
    random = np.random.default_rng(seed)
    classes = class_of_prefix(dtype)
    num_classes = min(num_classes, int(classes.max()) + 1)
    first = int(random.integers(0, int(classes.max()) + 2 - num_classes))
    codes = random.integers(0, len(LENGTHS), num_classes)
    lengths = LENGTHS[[len(LENGTHS) - 1] * num_classes if longest else codes]
    old = random.integers(0, 2 * ELEMENTS[dtype][2], 700).astype(BITS[dtype])
    index = classes[old >> ELEMENTS[dtype][0]] - first
    each = np.where(index < num_classes, lengths[np.clip(index, 0, num_classes - 1)], 0)
    at = int(random.integers(0, 700))
    count = int(random.integers(0, 701 - at))
    for use_table in {False, HAS_LOOKUP}:
        line = build_line(dtype, first, lengths, use_table)
        assert (line.shape[3] >= 0) == (use_table and num_classes < STRIDE)
        assert sum_lengths(old, at, count, *line) == each[at : at + count].sum()
        limit = int(each.sum() * random.random())
        strides = np.append(0, np.cumsum(each[at:])[STRIDE - 1 :: STRIDE])
        fits = int(np.searchsorted(strides, limit, "right")) - 1
        assert skip(old, at, 700, 0, limit, *line) == (at + STRIDE * fits, strides[fits])


FRAME = """
import hashlib, torch
from gossamer.comm.codec import build_codec
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.codec.lanes import HAS_LOOKUP
from gossamer.comm.codec.part import PartEncoder, Rows
seed = torch.Generator().manual_seed(1)
master = torch.randn(256, 320, generator=seed)
old = master.bfloat16()
new = (master + 1e-5 * torch.randn(256, 320, generator=seed)).bfloat16()
encoder = PartEncoder()
encoder.move_base(encoder.encode([Rows("w", (256, 320), 0, old)], False, True))
(run,) = encoder.encode([Rows("w", (256, 320), 0, new)], True, False).delta
bits = tensor_bits(old).copy()
positions, patterns = build_codec(run.codec, 1).decode(run, bits)
bits[positions] = patterns
assert (bits == tensor_bits(new)).all()
print(run.codec, HAS_LOOKUP, hashlib.sha256(b"".join(b for _, _, b in run.blocks())).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LOOKUP, reason="this processor has no AVX-512")
def test_processors_without_the_instruction_write_the_same_bytes(tmp_path):
    told = []
    for settings_of_numba in ({}, {"NUMBA_CPU_NAME": "x86-64-v3"}):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **settings_of_numba}
        command = [sys.executable, "-c", FRAME]
        told.append(subprocess.check_output(command, env=environment, text=True).split())
    (codec, _, ours), (_, has_lookup, theirs) = told
    assert codec == "entropy" and has_lookup == "False" and ours == theirs
