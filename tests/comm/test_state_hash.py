import numpy as np
from gossamer.comm.state_hash import (
    CHUNK_ELEMENTS,
    MASK_64,
    TensorHash,
    hash_change,
    hash_elements,
    state_hash,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def slow_sum(bits, start):
    """The definition, one element at a time."""
    total = 0
    for index, pattern in enumerate(bits.tolist(), start):
        word = (index * 0x9E3779B97F4A7C15) & MASK_64 ^ pattern
        word = (word ^ word >> 31) * 0xBF58476D1CE4E5B9 & MASK_64
        word = (word ^ word >> 31) * 0x94D049BB133111EB & MASK_64
        total += word ^ word >> 31
    return total & MASK_64


@settings(deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    size=st.integers(0, 300),
    start=st.integers(0, 2**40),
    seed=st.integers(0, 2**32),
)
def test_the_sum_is_its_definition(dtype, size, start, seed):
    top = int(np.iinfo(dtype).max)
    bits = np.random.default_rng(seed).integers(0, top, size, dtype, endpoint=True)
    assert hash_elements(bits, start) == slow_sum(bits, start)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), density=st.sampled_from([0.0, 0.01, 0.7, 1.0]))
def test_changes_add_up_to_a_full_recompute(seed, density):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2**16, 3 * CHUNK_ELEMENTS // 2, np.uint16)
    new = np.where(rng.random(len(old)) < density, rng.integers(0, 2**16, len(old)), old)
    new = new.astype(np.uint16)
    where = np.flatnonzero(old != new)
    gained = hash_change(where, old[where], new[where], start=640)
    assert (hash_elements(old, 640) + gained) & MASK_64 == hash_elements(new, 640)


def test_sums_of_parts_add_up():
    bits = np.arange(70_000, dtype=np.uint32)
    parts = hash_elements(bits[:40_001]) + hash_elements(bits[40_001:], 40_001)
    assert parts & MASK_64 == hash_elements(bits)


def test_swapped_flipped_and_moved_elements_show():
    bits = np.zeros(64, np.uint16)
    seen = {hash_elements(bits)}
    for place in range(64):
        for bit in range(16):
            bits[place] = 1 << bit
            seen.add(hash_elements(bits))
        bits[place] = 0
    assert len(seen) == 1 + 64 * 16


def test_the_state_hash_knows_names_dtypes_and_shapes():
    base = {"a": TensorHash("bfloat16", (2, 3), 5), "b": TensorHash("bfloat16", (6,), 7)}
    others = [
        {"a": base["a"]},
        {"a": base["b"], "b": base["a"]},
        base | {"a": TensorHash("float16", (2, 3), 5)},
        base | {"a": TensorHash("bfloat16", (3, 2), 5)},
        base | {"a": TensorHash("bfloat16", (2, 3), 6)},
    ]
    assert len({state_hash(each) for each in [base, *others]}) == 6
    assert state_hash(dict(reversed(base.items()))) == state_hash(base)
