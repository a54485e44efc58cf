import numpy as np
from gossamer.comm.run import Run
from gossamer.comm.state_hash import (
    MASK_64,
    format_hash,
    hash_change,
    hash_elements,
    run_seed,
    tensor_seed,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def slow_sum(bits, seed):
    """The definition, one element at a time."""
    total = 0
    for index, pattern in enumerate(bits.tolist()):
        word = (seed + index * 0x9E3779B97F4A7C15) & MASK_64 ^ pattern
        word = (word ^ word >> 31) * 0xBF58476D1CE4E5B9 & MASK_64
        word = (word ^ word >> 31) * 0x94D049BB133111EB & MASK_64
        total += word ^ word >> 31
    return total & MASK_64


@settings(deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    size=st.integers(0, 300),
    seed=st.integers(0, MASK_64),
)
def test_the_sum_is_its_definition(dtype, size, seed):
    top = int(np.iinfo(dtype).max)
    bits = np.random.default_rng(seed).integers(0, top, size, dtype, endpoint=True)
    assert hash_elements(bits, seed) == slow_sum(bits, seed)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), density=st.sampled_from([0.0, 0.01, 0.7, 1.0]))
def test_changes_add_up_to_a_full_recompute(seed, density):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2**16, 5000, np.uint16)
    new = np.where(rng.random(len(old)) < density, rng.integers(0, 2**16, len(old)), old)
    new = new.astype(np.uint16)
    where = np.flatnonzero(old != new).astype(np.uint32)
    gained = hash_change(640, where, old[where], new[where])
    assert (hash_elements(old, 640) + gained) & MASK_64 == hash_elements(new, 640)


def test_sums_of_runs_add_up_to_the_tensors():
    bits = np.arange(70_000, dtype=np.uint32)
    runs = [
        Run("w", "int32", (700, 100), start, stop - start) for start, stop in ((0, 64), (64, 700))
    ]
    parts = sum(
        hash_elements(bits[run.start : run.start + run.num_elements], run_seed(run)) for run in runs
    )
    assert parts & MASK_64 == hash_elements(bits, tensor_seed("w", "int32", (700, 100)))


def test_swapped_flipped_and_moved_elements_show():
    bits = np.zeros(64, np.uint16)
    seen = {hash_elements(bits, 5)}
    for place in range(64):
        for bit in range(16):
            bits[place] = 1 << bit
            seen.add(hash_elements(bits, 5))
        bits[place] = 0
    assert len(seen) == 1 + 64 * 16


def test_the_hash_knows_names_dtypes_and_shapes():
    kinds = [("a", "bfloat16", (2, 3)), ("b", "bfloat16", (2, 3)), ("a", "float16", (2, 3)),
             ("a", "bfloat16", (3, 2)), ("a", "bfloat16", (6,))]  # fmt: skip
    sums = {hash_elements(np.arange(6, dtype=np.uint16), tensor_seed(*kind)) for kind in kinds}
    assert len(sums) == len(kinds)
    assert format_hash(MASK_64 + 3) == "0000000000000002"
