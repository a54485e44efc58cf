"""What every codec owes: exact bits of changed places, block by block; on broken bytes WireError
or places in the run, for the frame's digest and the state hash to refuse."""

import dataclasses

import numpy as np
import pytest
from coded_runs import DTYPES, coded
from gossamer.comm.codec import CODECS, build_codec
from gossamer.comm.run import Run, WireError
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def changes(draw):
    """(run, old, new): any dtype, patterns and density, any steps, at least one change."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    num_rows, row_elements = draw(st.integers(1, 300)), draw(st.sampled_from([1, 3, 8, 65]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits, size = DTYPES[dtype], num_rows * row_elements
    top = int(np.iinfo(bits).max)
    old = rng.integers(0, top, size, bits, endpoint=True)
    mask = rng.random(size) < draw(st.sampled_from([0.002, 0.02, 0.3, 1.0]))
    mask[rng.integers(size)] = True
    reach = draw(st.sampled_from([1, 3, top]))
    step = rng.integers(1, reach, size, bits, endpoint=True)
    new = np.where(mask, old + np.where(rng.random(size) < 0.5, step, -step), old).astype(bits)
    shape = (num_rows, row_elements)
    run = Run("w", dtype, shape, 0, num_rows, block_rows=64 * draw(st.integers(1, 3)))
    return run, old, new


def applied(found, old):
    """`old` after what a codec decoded."""
    positions, patterns = found
    live = old.copy()
    live[slice(None) if positions is None else positions] = patterns
    return live


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(case=changes())
def test_a_codec_gives_back_the_changed_bits(codec, case):
    run, old, new = case
    before = old.copy()
    run = coded(codec, run, old, new)
    positions, patterns = build_codec(codec).decode(run, old)
    assert patterns.dtype == old.dtype
    assert np.array_equal(applied((positions, patterns), old), new)
    assert positions is None or np.array_equal(positions, np.flatnonzero(old != new))
    assert np.array_equal(old, before)


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(case=changes(), pick=st.integers(0, 10**6))
def test_a_block_decodes_from_its_own_old_values_alone(codec, case, pick):
    run, old, new = case
    run = coded(codec, run, old, new)
    blocks = [each for each in run.blocks() if each[2]]
    lo, hi, payload = blocks[pick % len(blocks)]
    elsewhere_wrong = ~old
    elsewhere_wrong[lo:hi] = old[lo:hi]
    nbytes = [len(payload) if start == lo else 0 for start, _, _ in run.blocks()]
    changed = int((old[lo:hi] != new[lo:hi]).sum())
    alone = dataclasses.replace(run, block_nbytes=tuple(nbytes), payload=payload, count=changed)
    if codec != "dense":  # which codes whole runs only
        positions, patterns = build_codec(codec).decode(alone, elsewhere_wrong)
        assert np.array_equal(positions, lo + np.flatnonzero(old[lo:hi] != new[lo:hi]))
        assert np.array_equal(patterns, new[positions])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8", "bfloat16", "float16"])
def test_every_pattern_can_become_every_other(codec, dtype):
    size = int(np.iinfo(DTYPES[dtype]).max) + 1
    old = np.arange(size, dtype=DTYPES[dtype])
    run = Run("w", dtype, (size // 64, 64), 0, size // 64)
    for shift in (1, 2, size // 2, size - 1):
        new = np.roll(old, shift)
        found = build_codec(codec).decode(coded(codec, run, old, new), old)
        assert np.array_equal(applied(found, old), new)


@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None)
@given(case=changes(), data=st.data())
def test_broken_payloads_give_wire_errors_or_places_in_the_run(codec, case, data):
    run, old, new = case
    run = coded(codec, run, old, new)
    payload, nbytes = bytearray(run.payload), list(run.block_nbytes)
    if data.draw(st.booleans()):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        last = max(i for i, each in enumerate(nbytes) if each)
        cut = data.draw(st.integers(1, nbytes[last]))
        nbytes[last] -= cut
        del payload[-cut:]
    broken = dataclasses.replace(run, payload=bytes(payload), block_nbytes=tuple(nbytes))
    try:
        positions, patterns = build_codec(codec).decode(broken, old)
    except WireError:
        return
    assert patterns.dtype == old.dtype
    if positions is None:
        assert len(patterns) == len(old)
    else:
        assert len(positions) == len(patterns) == run.count
        assert (positions < len(old)).all() and (np.diff(positions.astype(np.int64)) > 0).all()


@pytest.mark.parametrize("codec", CODECS)
def test_a_wrong_count_is_refused(codec):
    old = np.zeros(500, np.uint16)
    new = old.copy()
    new[::3] = 7
    run = coded(codec, Run("w", "bfloat16", (5, 100), 0, 5), old, new)
    for count in (run.count - 1, run.count + 1):
        with pytest.raises(WireError):
            build_codec(codec).decode(dataclasses.replace(run, count=count), old)


def test_an_unknown_codec_is_refused_by_name():
    with pytest.raises(WireError, match=r"codec 'os:system' is not one of dense, entropy, planes"):
        build_codec("os:system")
