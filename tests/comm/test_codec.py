import dataclasses

import numpy as np
import torch
from gossamer.comm.codec.bits import apply_steps, steps_between, tensor_bits
from gossamer.comm.codec.part import PartEncoder, Rows
from gossamer.comm.codec.runs import MAX_RUN_ELEMENTS, RunCodec, split_rows
from gossamer.comm.codec.step import StepCodec
from gossamer.comm.wire import Frame, Run, pack_frame
from hypothesis import given, settings
from hypothesis import strategies as st

RUN = Run("w", "bfloat16", (192, 32), 0, 192, 0, [])


def bf16_bits(values):
    return tensor_bits(torch.tensor(values, dtype=torch.bfloat16))


def encoded_bytes(rows_before, rows_after):
    """(delta, anchor) frame bytes of the same weights."""
    encoder = PartEncoder(zstd_level=1)
    encoder.move_base(encoder.encode(rows_before, with_delta=False, with_anchor=False))
    part = encoder.encode(rows_after, with_delta=True, with_anchor=True)
    frame = Frame("delta", "run", 2, 1, 2, 1, 0, 1, part.num_changed, part.delta)
    as_anchor = dataclasses.replace(frame, kind="anchor", base_version=None, runs=part.anchor)
    return len(pack_frame(frame)), len(pack_frame(as_anchor))


def test_neighbouring_floats_are_one_step_apart():
    for low, high in [(1.0, 1.0078125), (0.0, 9.2e-41), (-0.0, 0.0), (-1.0078125, -1.0)]:
        old, new = bf16_bits([low]), bf16_bits([high])
        assert steps_between(old, new).tolist() == [2]  # zigzag of +1
        assert steps_between(new, old).tolist() == [1]  # zigzag of -1


@settings(deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    seed=st.integers(0, 2**32),
)
def test_steps_lead_from_any_pattern_to_any_other(dtype, seed):
    rng = np.random.default_rng(seed)
    old, new = rng.integers(0, np.iinfo(dtype).max, (2, 500), dtype, endpoint=True)
    assert np.array_equal(apply_steps(old, steps_between(old, new)), new)
    assert (steps_between(old, new) == 0).tolist() == (old == new).tolist()


def test_tensor_bits_are_a_view_whatever_the_patterns():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensor = patterns.view(torch.bfloat16).view(256, 256)
    bits = tensor_bits(tensor)
    assert np.array_equal(bits, patterns.numpy().view(np.uint16))
    bits[0] = 0x7F81
    assert patterns[0] == 0x7F81


def test_runs_are_whole_blocks_and_bounded():
    for num_rows, row_elements in [(1, 5), (64, 7), (1000, 3), (150_000, 24), (130, 1 << 20)]:
        ranges = list(split_rows(num_rows, row_elements))
        assert [row for start, stop in ranges for row in (start, stop)][1:-1:2] == [
            start for start, _ in ranges[1:]
        ]
        assert ranges[0][0] == 0 and ranges[-1][1] == num_rows
        for start, stop in ranges:
            assert start % 64 == 0
            assert stop - start <= 64 or (stop - start) * row_elements <= MAX_RUN_ELEMENTS


def test_a_run_mixes_sparse_and_dense_blocks():
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2**16, RUN.num_elements, np.uint16)
    new = old.copy()
    new[5] ^= 1
    new[64 * 32 : 2 * 64 * 32] = rng.integers(0, 2**16, 64 * 32, np.uint16)
    positions = np.flatnonzero(old != new)
    blocks = RunCodec().encode_changes(RUN, old, new, positions)
    assert [(block.codec, block.index) for block in blocks] == [("step", 0), ("dense", 1)]
    where, patterns = RunCodec().decode(dataclasses.replace(RUN, blocks=blocks), old)
    live = old.copy()
    live[where] = patterns
    assert np.array_equal(live, new)
    assert sorted(where.tolist()) == positions.tolist()


@settings(deadline=None, max_examples=40)
@given(
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    kind=st.sampled_from(["random", "zero", "constant", "small"]),
    seed=st.integers(0, 2**32),
)
def test_a_delta_never_exceeds_the_anchor(density, kind, seed):
    rng = np.random.default_rng(seed)
    fresh = {
        "random": lambda n: rng.integers(0, 2**16, n),
        "zero": lambda n: np.zeros(n, np.int64),
        "constant": lambda n: np.full(n, 0x3F80),
        "small": lambda n: rng.integers(0, 4, n),
    }[kind]
    before, after = [], []
    for name, shape in {"w": (100, 64), "v": (3, 500), "b": (30,), "s": ()}.items():
        size = int(np.prod(shape))
        old = rng.integers(0, 2**16, size)
        new = np.where(rng.random(size) < density, fresh(size), old)
        for rows, patterns in ((before, old), (after, new)):
            values = torch.from_numpy(patterns.astype(np.uint16).view(np.int16))
            rows.append(Rows(name, shape, 0, values.view(torch.bfloat16).reshape(shape)))
    delta, anchor = encoded_bytes(before, after)
    assert delta <= anchor


def test_positions_cost_at_most_a_bitmap_and_little_when_few():
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2**15 - 1, 64 * 128, np.uint16)
    for density, most_bytes in ((0.5, len(old) / 8 + 40), (0.04, 370), (0.001, 60)):
        new = np.where(rng.random(len(old)) < density, old + 1, old).astype(np.uint16)
        (block,) = StepCodec().encode(old, new, np.flatnonzero(old != new), len(old))
        assert block.count > 4 and len(block.payload) < most_bytes


def test_small_steps_cost_about_a_byte_a_change():
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(512, 512, generator=generator) * 0.02
    moved = master + 2e-6 * torch.randn(512, 512, generator=generator)
    before, after = ([Rows("w", (512, 512), 0, values.bfloat16())] for values in (master, moved))
    changed = int((before[0].values.view(torch.int16) != after[0].values.view(torch.int16)).sum())
    delta, anchor = encoded_bytes(before, after)
    assert 0.02 < changed / 512**2 < 0.1
    assert delta < 1.5 * changed
    assert anchor > 512**2
