"""What every codec owes, and what a part owes: each bit back, never more bytes than an anchor."""

import dataclasses

import numpy as np
import torch
from coded_runs import coded
from gossamer.comm.codec import build_codec
from gossamer.comm.codec.bits import apply_steps, find_positions, steps_between, tensor_bits
from gossamer.comm.codec.part import PartEncoder, Rows
from gossamer.comm.run import Run
from gossamer.comm.wire import Frame, pack_frame, unpack_frame
from hypothesis import given, settings
from hypothesis import strategies as st


def bf16_bits(values):
    return tensor_bits(torch.tensor(values, dtype=torch.bfloat16))


def encoded_bytes(rows_before, rows_after):
    """(delta, anchor) frame bytes of the same weights."""
    encoder = PartEncoder()
    encoder.move_base(encoder.encode(rows_before, with_delta=False, with_anchor=True))
    part = encoder.encode(rows_after, with_delta=True, with_anchor=True)
    frame = Frame("delta", "run", 2, 1, "0" * 16, 2, 1, 0, 1, part.num_changed, 0, part.delta)
    as_anchor = dataclasses.replace(frame, kind="anchor", base_version=None, runs=part.anchor)
    return len(pack_frame(frame)), len(pack_frame(as_anchor))


def test_neighbouring_floats_are_one_step_apart():
    for low, high in [(1.0, 1.0078125), (0.0, 9.2e-41), (-0.0, 0.0), (-1.0078125, -1.0)]:
        old, new = bf16_bits([low]), bf16_bits([high])
        assert steps_between(old, new).tolist() == [2]  # zigzag of +1
        assert steps_between(new, old).tolist() == [1]  # zigzag of -1


@settings(deadline=None)
@given(dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]), seed=st.integers(0, 2**32))
def test_steps_lead_from_any_pattern_to_any_other(dtype, seed):
    rng = np.random.default_rng(seed)
    old, new = rng.integers(0, np.iinfo(dtype).max, (2, 500), dtype, endpoint=True)
    assert np.array_equal(apply_steps(old, steps_between(old, new)), new)
    assert (steps_between(old, new) == 0).tolist() == (old == new).tolist()


@settings(deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    size=st.integers(0, 200),
    skip=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_changes_are_found_wherever_the_words_begin(dtype, size, skip, seed):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 255, size + skip, dtype)[skip:]
    new = np.where(rng.random(size) < 0.1, old + 1, old).astype(dtype)
    assert np.array_equal(find_positions(old, new), np.flatnonzero(old != new))


def test_tensor_bits_are_a_view_whatever_the_patterns():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensor = patterns.view(torch.bfloat16).view(256, 256)
    bits = tensor_bits(tensor)
    assert np.array_equal(bits, patterns.numpy().view(np.uint16))
    bits[0] = 0x7F81
    assert patterns[0] == 0x7F81


def test_all_bf16_patterns_change_into_each_other():
    """Each of the 65,536 patterns once as old, once as new: NaN, -0.0 and infinities included."""
    old = np.arange(2**16, dtype=np.uint16)
    new = np.random.default_rng(0).permutation(old)
    run = coded("entropy", Run("w", "bfloat16", (256, 256), 0, 256), old, new)
    positions, patterns = build_codec("entropy").decode(run, old)
    live = old.copy()
    live[positions] = patterns
    assert np.array_equal(live, new)


@settings(deadline=None, max_examples=40)
@given(
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    kind=st.sampled_from(["random", "zero", "constant", "small"]),
    seed=st.integers(0, 2**32),
)
def test_a_delta_hardly_exceeds_the_anchor(density, kind, seed):
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
    assert delta <= anchor + 40


def weights_and_step(shape, lr, seed=0):
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(shape, generator=generator) * 0.02
    return master, master + lr * torch.randn(shape, generator=generator)


def test_small_steps_cost_less_than_a_byte_a_change():
    shape = (1024, 512)
    masters = weights_and_step(shape, 2e-6)
    before, after = ([Rows("w", shape, 0, values.bfloat16())] for values in masters)
    changed = int((before[0].values.view(torch.int16) != after[0].values.view(torch.int16)).sum())
    delta, anchor = encoded_bytes(before, after)
    assert 0.02 < changed / 512**2 / 2 < 0.1
    assert delta < 0.8 * changed
    assert anchor > 512**2 * 2


def test_the_ladder_weighs_bytes_against_the_link():
    shape = (512, 512)
    small, large = (weights_and_step(shape, lr) for lr in (1e-6, 1.0))

    def codecs(masters, link_mbit=None):
        encoder = PartEncoder(link_mbit=link_mbit)
        rows = [{"w": values.bfloat16(), "same": torch.ones(8)} for values in masters]
        rows = [[Rows(n, tuple(v.shape), 0, v) for n, v in each.items()] for each in rows]
        encoder.move_base(encoder.encode(rows[0], with_delta=False, with_anchor=True))
        part = encoder.encode(rows[1], with_delta=True, with_anchor=False)
        assert part.num_empty == 1
        return [run.codec for run in part.delta], list(part.runs_by_choice)

    assert codecs(small)[0] == ["entropy"]
    assert codecs(large)[0] == ["dense"]
    assert codecs(small, link_mbit=10)[0] == ["entropy"]
    assert codecs(small, link_mbit=1e6)[0] == ["planes"]
    assert "quickest on 10 Mbit/s" in codecs(small, link_mbit=10)[1][0][1]


def test_threads_change_no_byte():
    shape = (300, 64)
    masters = weights_and_step(shape, 1e-5)
    rows = [
        [Rows(f"layers.{i}.w", shape, 0, (values * (1 + i)).bfloat16()) for i in range(9)]
        for values in masters
    ]
    frames = []
    for num_threads in (1, 3):
        encoder = PartEncoder(num_threads=num_threads)
        encoder.move_base(encoder.encode(iter(rows[0]), with_delta=False, with_anchor=True))
        part = encoder.encode(iter(rows[1]), with_delta=True, with_anchor=False)
        frame = Frame("delta", "run", 1, 0, "0" * 16, 1, 1, 0, 1, 1, part.delta_gain, part.delta)
        frames.append(pack_frame(frame))
    assert frames[0] == frames[1]
    runs = unpack_frame(frames[0]).runs
    assert [run.name for run in runs] == [f"layers.{i}.w" for i in range(9)]
    assert len({run.model for run in runs}) == 1  # nine small matrices share one model
