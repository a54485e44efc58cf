"""The entropy codec against a decoder written from comm/wire.py's text alone, and its size."""

import numpy as np
import pytest
import torch
from coded_runs import DTYPES, coded
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.codec.bound import bound_bytes
from gossamer.comm.codec.hazard import CUMULATIVE, LENGTHS, WINDOW
from gossamer.comm.codec.part import PartEncoder, Rows
from gossamer.comm.run import Run
from gossamer.comm.wire import Frame, pack_frame
from hypothesis import given, settings
from hypothesis import strategies as st

SHIFT = {"bfloat16": 7, "float16": 10, "float32": 23, "int8": 4, "uint8": 4,
         "float8_e4m3fn": 3, "int32": 24}  # fmt: skip


def order(pattern, dtype, width):
    """Place of a bit pattern in the order of values."""
    sign = 1 << (width - 1)
    if dtype.startswith("uint"):
        return pattern
    if dtype.startswith("int"):
        return pattern ^ sign
    return pattern ^ (2 * sign - 1 if pattern & sign else sign)


class Stream:
    """One block's bytes as a rANS state."""

    def __init__(self, payload):
        self.rest = list(payload)
        self.state = self.rest.pop(0) if len(payload) % 2 else 0
        self.refill()

    def refill(self):
        while self.state < 2**47 and self.rest:
            low, high = self.rest[:2]
            del self.rest[:2]
            self.state = self.state << 16 | low | high << 8

    def take(self, start, size, scale):
        self.state = size * (self.state >> scale) + self.state % 2**scale - start
        self.refill()


def distribution(length):
    node, rest = divmod(length, 2**18)
    below, above = int(CUMULATIVE[node]), int(CUMULATIVE[node + 1])
    return below + ((above - below) * rest >> 18)


def read_step(stream, frequencies):
    place, start = stream.state % 4096, 0
    symbol = 0
    while place >= start + frequencies[symbol]:
        start += frequencies[symbol]
        symbol += 1
    stream.take(start, frequencies[symbol], 12)
    if symbol < 24:
        return symbol
    bits, rest = symbol - 24, 1
    while bits:
        some = min(bits, 16)
        rest = rest << some | stream.state % 2**some
        stream.take(stream.state % 2**some, 1, some)
        bits -= some
    return rest + 23


def slow_decode(run, old):
    """All new patterns of a run, element by element."""
    width, model = 8 * old.itemsize, run.model
    is_float = "int" not in run.dtype
    mask, sign = 2**width - 1, 1 << (width - 1)
    new = [int(pattern) for pattern in old]
    for lo, hi, payload in run.blocks():
        if not payload:
            continue
        stream, length = Stream(payload), 0
        for word in range(lo, hi, 4):
            for at in range(word, min(word + 4, hi)):
                before = new[at]
                prefix = before >> SHIFT[run.dtype]
                kind = prefix % (sign >> SHIFT[run.dtype]) if is_float else prefix
                row = max(kind - model.first, 0)
                end = length
                if row < len(model.lengths):
                    end += int(LENGTHS[model.lengths[row]])
                if distribution(end) > stream.state % 2**36:
                    start = distribution(length)
                    stream.take(start, distribution(end) - start, 36)
                    zigzag = read_step(stream, model.steps[row]) + 1
                    step = (zigzag >> 1) ^ -(zigzag & 1)
                    step = -step if is_float and before & sign else step
                    place = (order(before, run.dtype, width) + step) & mask
                    after = place
                    if run.dtype.startswith("int"):
                        after = place ^ sign
                    elif is_float:
                        after = place ^ (sign if place & sign else mask)
                    new[at], end = after, 0
                length = end
            if word + 4 <= hi and length >= WINDOW:
                start = distribution(length)
                stream.take(start, 2**36 - start, 36)
                length = 0
        start = distribution(length)
        stream.take(start, 2**36 - start, 36)
        assert stream.state == 1 and not stream.rest
    return np.array(new, old.dtype)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    num_rows=st.integers(1, 150),
    row_elements=st.sampled_from([1, 5, 8]),
    density=st.sampled_from([0.001, 0.1, 0.9]),
    far=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_decoder_written_from_the_text_agrees(dtype, num_rows, row_elements, density, far, seed):
    rng = np.random.default_rng(seed)
    bits = DTYPES[dtype]
    size, top = num_rows * row_elements, int(np.iinfo(bits).max)
    old = rng.integers(0, top, size, bits, endpoint=True)
    fresh = rng.integers(0, top, size, bits, endpoint=True) if far else old - 1
    new = np.where(rng.random(size) < density, fresh, old).astype(bits)
    new[-1] = old[-1] ^ 1
    run = coded("entropy", Run("w", dtype, (num_rows, row_elements), 0, num_rows), old, new)
    assert np.array_equal(slow_decode(run, old), new)


def trained_pair(shape, lr, seed):
    """bf16 weights of mixed scales before and after an Adam-like step of their fp32 masters."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.02 * torch.exp(0.5 * torch.randn(shape[0], 1, generator=generator))
    master = torch.randn(shape, generator=generator) * scale
    update = torch.randn(shape, generator=generator).clamp(-1, 1)
    return master.bfloat16(), (master - lr * update).bfloat16()


@pytest.mark.parametrize(
    ("lr", "over_bound", "under_pairs"), [(1e-7, 1.15, 5), (1e-6, 1.08, 7), (1e-4, 1.03, 9)]
)
def test_frames_are_near_the_bound(lr, over_bound, under_pairs):
    shapes = {f"layers.{i}.{n}": s for i in range(4) for n, s in
              {"up": (1024, 512), "down": (512, 1024), "norm": (512,)}.items()}  # fmt: skip
    pairs = {
        name: trained_pair(shape if len(shape) > 1 else (1, *shape), lr, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    encoder = PartEncoder()
    before, after = (
        [Rows(name, shapes[name], 0, pair[i].reshape(shapes[name])) for name, pair in pairs.items()]
        for i in (0, 1)
    )
    encoder.move_base(encoder.encode(before, with_delta=False, with_anchor=True))
    part = encoder.encode(after, with_delta=True, with_anchor=False)
    frame = Frame("delta", "run", 1, 0, "0" * 16, 1, 1, 0, 1, part.num_changed, 0, part.delta)
    bound = sum(
        bound_bytes(tensor_bits(pair[0]), tensor_bits(pair[1]), "bfloat16")
        for pair in pairs.values()
    )
    nbytes = len(pack_frame(frame))
    print(f"{nbytes / bound:.3f} of the bound, {6 * part.num_changed / nbytes:.2f} x below pairs")
    assert nbytes < over_bound * bound
    assert nbytes * under_pairs < 6 * part.num_changed  # int32 + bf16
