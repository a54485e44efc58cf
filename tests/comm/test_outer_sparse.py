"""Kept values beside a plain reference: numpy's stable sort, and a decoder that reads the bits one
by one as the docstring of sparse.py tells them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gossamer.comm.outer.sparse import Cut, compress, decompress, rice_bits
from gossamer.comm.outer.stream import BAD_COUNT, read_run
from gossamer.comm.run import WireError
from hypothesis import given, settings
from hypothesis import strategies as st

KS = (1, 3, 64, 200, 1024, 4096)
SHAPES = [(64, 64), (128, 192), (100, 100), (64, 65), (4096,), (4097,), (5000,), (1,), (3, 5000)]
SHAPES += [(64, 4, 16), (1, 64), ()]


def blocks_of(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Flat indices of each block, in its order."""
    num_rows = shape[0] if len(shape) > 1 else 1
    flat = np.arange(math.prod(shape))
    columns = len(flat) // num_rows
    if num_rows % 64 == columns % 64 == 0:
        tiles = flat.reshape(num_rows // 64, 64, columns // 64, 64).transpose(0, 2, 1, 3)
        return list(tiles.reshape(-1, 4096))
    return [flat[begin : begin + 4096] for begin in range(0, len(flat), 4096)]


def reference_positions(rows: np.ndarray, k: int) -> list[np.ndarray]:
    """By block: the greatest magnitudes, of equal ones the first, no zeros, ascending."""
    found = []
    for block in blocks_of(rows.shape):
        size = max(1, (k * len(block) + 2048) // 4096)
        magnitudes = np.abs(rows.reshape(-1)[block])
        kept = np.sort(np.argsort(-magnitudes, kind="stable")[:size])
        found.append(block[kept[magnitudes[kept] > 0]])
    return found


def reference_decode(payload: bytes, k: int, shape: tuple[int, ...]) -> tuple[list, list]:
    """Positions and values, bit by bit."""
    bits = iter(np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little").tolist())
    rice = rice_bits(k)

    def take(count: int) -> int:
        return sum(next(bits) << place for place in range(count))

    positions, values = [], []
    for block in blocks_of(shape):
        steps, top = take(5), take(11)
        if top == 0:
            continue
        upper, lower = np.array([top << 20, (top - steps) << 20], np.uint32).view(np.float32)
        place = 0
        for _ in range(max(1, (k * len(block) + 2048) // 4096)):
            zeros = 0
            while next(bits) == 0:
                zeros += 1
            place += (zeros << rice) + take(rice)
            if place == len(block):
                break
            value = upper if take(1) else lower
            values.append(-value if take(1) else value)
            positions.append(block[place])
            place += 1
    rest = list(bits)
    assert len(rest) < 8 and not any(rest)
    return positions, values


def decoded(payload: bytes, k: int, count: int, shape: tuple[int, ...]):
    num_rows = shape[0] if len(shape) > 1 else 1
    return decompress(payload, k, count, num_rows, math.prod(shape) // num_rows)


def check(rows: np.ndarray, k: int) -> None:
    sparse = compress(torch.from_numpy(rows), k)
    expected = reference_positions(rows, k)
    # blocks below 2**-129 send nothing
    kept = [block for block in expected if np.isin(block, sparse.positions).any()]
    assert np.array_equal(np.concatenate([*kept, np.empty(0, np.int64)]), sparse.positions)
    left_out = [block for block in expected if not np.isin(block, sparse.positions).any()]
    assert all(
        np.abs(rows.reshape(-1)[block]).mean() < 2.0**-129 for block in left_out if len(block)
    )
    assert np.isfinite(sparse.values).all() and (sparse.values != 0).all()
    signs = np.signbit(rows.reshape(-1)[sparse.positions])
    assert np.array_equal(np.signbit(sparse.values), signs)
    if not sparse.payload:
        assert len(sparse.positions) == 0
        return
    again = decoded(sparse.payload, k, len(sparse.values), rows.shape)
    assert np.array_equal(again.positions, sparse.positions)
    assert np.array_equal(again.values, sparse.values)
    positions, values = reference_decode(sparse.payload, k, rows.shape)
    assert np.array_equal(positions, sparse.positions) and np.array_equal(values, sparse.values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", KS)
def test_the_greatest_are_kept_and_come_back(shape, k):
    rng = np.random.default_rng(k)
    rows = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    check(np.asarray(rows, np.float32), k)


patterns = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.0000001, 3e38, -3.4028235e38, 1e-45, -1e-40, 2.0**-126, 0.5, -2.5]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(patterns, min_size=1, max_size=12),
    st.sampled_from(SHAPES),
    st.sampled_from(KS),
    st.integers(0, 2**32 - 1),
    st.floats(0, 1),
)
def test_ties_zeros_and_extremes(values, shape, k, seed, share):
    rng = np.random.default_rng(seed)
    rows = rng.choice(np.array(values, np.float32), size=shape)
    rows = np.where(rng.random(shape) < share, rows, np.float32(0))
    check(np.asarray(rows, np.float32), k)


def test_scales_from_block_to_block():
    rng = np.random.default_rng(0)
    scales = np.exp2(rng.uniform(-140, 120, (64, 1)))
    check((rng.standard_normal((64, 4096)) * scales).astype(np.float32).reshape(-1), 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("shape", "place"), [((70, 70), 4899), ((64, 64), 77), ((4099,), 4098)])
def test_what_is_not_finite_is_refused(value, shape, place):
    rows = torch.zeros(shape)
    rows.view(-1)[place] = value
    with pytest.raises(ValueError, match=f"element {place} is not finite"):
        compress(rows, 64)


@pytest.mark.parametrize(
    ("rows", "k", "message"),
    [
        (torch.zeros(4), 0, "k must be from 1 to 4096, not 0"),
        (torch.zeros(4), 4097, "k must be from 1 to 4096"),
        (torch.zeros(4).double(), 1, "float32"),
        (torch.zeros(0), 1, "float32"),
        (torch.zeros(8, 8).T[:4], 1, "contiguous"),
    ],
)
def test_other_rows_are_refused(rows, k, message):
    with pytest.raises(ValueError, match=message):
        compress(rows, k)


@pytest.mark.parametrize("heavy", [False, True])
def test_levels_are_nearly_the_best(heavy):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((50, 4096))
    rows = np.asarray(rows**3 if heavy else rows, np.float32)
    sparse = compress(torch.from_numpy(rows.reshape(-1)), 64)
    exact = rows.reshape(-1)[sparse.positions]
    error = np.square(exact - sparse.values, dtype=np.float64).sum()
    best = 0.0
    for block in np.sort(np.abs(exact.astype(np.float64)).reshape(50, 64), axis=1):
        splits = [(block[:at], block[at:]) for at in range(1, 64)]
        best += min(sum(part.var() * len(part) for part in pair) for pair in splits)
    # three bits of fraction: a thousandth of the energy
    assert error <= 1.05 * best + 0.0015 * np.square(exact, dtype=np.float64).sum()


def test_broken_bits_are_refused():
    rows = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    sparse = compress(rows, 64)
    payload, count = sparse.payload, len(sparse.values)
    for wrong in (payload[:-1], payload + b"\0", payload[:10], b""):
        with pytest.raises(WireError):
            decompress(wrong, 64, count, 100, 100)
    for number in (count - 1, count + 1, 1, 10_000):
        with pytest.raises(WireError):
            decompress(payload, 64, number, 100, 100)
    for head in (b"\xff\xff", b"\x01\x00", b"\x22\x00"):  # NaN; a step below nothing; level 0
        with pytest.raises(WireError, match="levels"):
            decompress(head + payload[2:], 64, count, 100, 100)
    with pytest.raises(WireError, match="leaves its block"):
        decompress(payload[:2] + bytes(40) + payload[42:], 64, count, 100, 100)


def bits_of(blocks: list[tuple[int, int, list[int]]], rice: int) -> str:
    """The bits of blocks (level, steps, gaps), all values lower ones and positive; a gap of 10,000
    or more ends its block, 10,000 less."""
    text = ""
    for top, steps, gaps in blocks:
        text += f"{top << 5 | steps:016b}"[::-1]
        for gap in gaps:
            is_end, gap = gap >= 10_000, gap % 10_000
            rest = f"{gap & (1 << rice) - 1:0{rice}b}"[::-1] if rice else ""
            text += "0" * (gap >> rice) + "1" + rest + ("" if is_end else "00")
    return text


def read(text: str, count: int, num_elements: int = 5000) -> list[int]:
    bits = np.array(list(text), np.uint8)
    payload = np.packbits(bits, bitorder="little").tobytes()
    return decompress(payload, 64, count, 1, num_elements).positions.tolist()


def test_what_no_encoder_writes_is_refused():
    """5000 elements are a block of 4096, 64 of them kept, and one of 904, of which it is 14."""
    rice, empty, end = rice_bits(64), (0, 0, []), 10_000
    first, second = (1016, 1, [5, 0, 4000, end + 88]), (1016, 0, [903, end])
    assert read(bits_of([first, second], rice), 4) == [5, 6, 4007, 4999]
    assert read(bits_of([empty, second], rice), 1) == [4999]
    for gaps in ([5, 4091], [5, 4091 + 10], [4096], [4097], [end + 4096], [5, end + 4091]):
        with pytest.raises(WireError, match="leaves its block|number of values|end"):
            read(bits_of([(1016, 1, gaps), second], rice), len(gaps) + 1)
    wrong = {
        "leaves": [(1016, 1, [5, end + 4091]), second],
        "levels": [(0x7F8, 1, [5, end + 4090]), second],
        "number": [(1016, 1, [5, 6, end + 4083]), second],
        "end": [(1016, 1, [5, end + 4090]), second, empty],
    }
    assert read(bits_of([(1016, 1, [5, end + 4090]), second], rice), 2) == [5, 4999]
    for message, blocks in wrong.items():
        with pytest.raises(WireError, match=message):
            read(bits_of(blocks, rice), 2)
    text = bits_of([first, second], rice)
    assert len(text) % 8
    with pytest.raises(WireError, match="end"):
        read(text + "1", 4)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_decoder_writes_within_its_room(room):
    """More values than promised: nothing behind the arrays is touched."""
    rows = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    words = np.zeros(200, np.uint64)
    payload = compress(rows, 64).payload
    words.view(np.uint8)[: len(payload)] = np.frombuffer(payload, np.uint8)
    arrays = [np.full(400, 7, np.uint32) for _ in range(2)]
    inside = [array[:room] for array in arrays]
    status = read_run(
        words, 8 * len(payload), 10_000, 64, rice_bits(64), *Cut.of(100, 100), *inside
    )
    assert status == BAD_COUNT
    assert all((array[room:] == 7).all() for array in arrays)
