"""What every codec owes: exact bits of changed places, block by block, and WireError otherwise."""

import dataclasses

import numpy as np
import pytest
from gossamer.comm.codec import CODECS, build_codec
from gossamer.comm.wire import WireError
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [np.uint8, np.uint16, np.uint32]


@st.composite
def changes(draw):
    """(old, new, block_elements): any patterns, any density, small and large steps."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.integers(1, 3000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    top = int(np.iinfo(dtype).max)
    old = rng.integers(0, top, size, dtype, endpoint=True)
    mask = rng.random(size) < draw(st.sampled_from([0.0, 0.002, 0.02, 0.3, 1.0]))
    reach = draw(st.sampled_from([1, 3, top]))
    step = rng.integers(1, reach, size, dtype, endpoint=True)
    new = np.where(mask, old + np.where(rng.random(size) < 0.5, step, -step), old).astype(dtype)
    return old, new, draw(st.integers(1, 4000))


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None)
@given(case=changes())
def test_a_codec_gives_back_the_changed_bits(name, case):
    old, new, block_elements = case
    before, positions = old.copy(), np.flatnonzero(old != new)
    blocks = build_codec(name).encode(old, new, positions, block_elements)
    touched = np.unique(positions // block_elements).tolist()
    assert [block.index for block in blocks] == touched
    assert all(block.codec == name for block in blocks)
    where, patterns = build_codec(name).decode(blocks, old, block_elements)
    assert np.array_equal(where, positions)
    assert patterns.dtype == old.dtype
    assert np.array_equal(patterns, new[positions])
    assert np.array_equal(old, before)


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None)
@given(case=changes(), pick=st.integers(0, 10**6))
def test_a_block_decodes_from_its_own_old_values_alone(name, case, pick):
    old, new, block_elements = case
    positions = np.flatnonzero(old != new)
    blocks = build_codec(name).encode(old, new, positions, block_elements)
    if not blocks:
        return
    block = blocks[pick % len(blocks)]
    inside = slice(block.index * block_elements, (block.index + 1) * block_elements)
    elsewhere_wrong = ~old
    elsewhere_wrong[inside] = old[inside]
    where, patterns = build_codec(name).decode([block], elsewhere_wrong, block_elements)
    assert np.array_equal(where, positions[positions // block_elements == block.index])
    assert np.array_equal(patterns, new[where])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_pattern_can_become_every_other(name, dtype):
    size = int(np.iinfo(dtype).max) + 1
    old = np.arange(size, dtype=dtype)
    codec = build_codec(name)
    for shift in (1, 2, size // 2, size - 1):
        new = np.roll(old, shift)
        blocks = codec.encode(old, new, np.arange(size), 4096)
        where, patterns = codec.decode(blocks, old, 4096)
        assert np.array_equal(where, np.arange(size))
        assert np.array_equal(patterns, new)


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None)
@given(case=changes(), pick=st.integers(0, 10**6), data=st.data())
def test_broken_payloads_give_wire_errors_or_places_in_the_block(name, case, pick, data):
    old, new, block_elements = case
    blocks = build_codec(name).encode(old, new, np.flatnonzero(old != new), block_elements)
    if not blocks:
        return
    block = blocks[pick % len(blocks)]
    payload = bytearray(block.payload)
    if data.draw(st.booleans()):
        payload = payload[: data.draw(st.integers(0, len(payload) - 1))]
    else:
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    broken = dataclasses.replace(block, payload=bytes(payload))
    try:
        where, patterns = build_codec(name).decode([broken], old, block_elements)
    except WireError:
        return
    assert len(payload) == len(block.payload)  # no cut goes unseen
    assert len(where) == len(patterns) <= block.count
    assert np.array_equal(where // block_elements, np.full(len(where), block.index))
    assert (where < len(old)).all() and (np.diff(where) > 0).all()


@pytest.mark.parametrize("name", CODECS)
def test_a_wrong_count_is_refused(name):
    old = np.zeros(500, np.uint16)
    new = old.copy()
    new[::3] = 7
    (block,) = build_codec(name).encode(old, new, np.flatnonzero(new), 500)
    for count in (block.count - 1, block.count + 1):
        wrong = dataclasses.replace(block, count=count)
        with pytest.raises(WireError):
            build_codec(name).decode([wrong], old, 500)


def test_an_unknown_codec_is_refused_by_name():
    with pytest.raises(WireError, match=r"codec 'os:system' is not one of dense, step"):
        build_codec("os:system")
