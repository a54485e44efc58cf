"""Budgets of matrices: sums, the dense fallback, stacked experts, floors."""

import math

import pytest
from gossamer.trainer.sparsity.config import DistributionConfig
from gossamer.trainer.sparsity.distributions import counts, densities, pool_of
from hypothesis import given
from hypothesis import strategies as st

ERK = DistributionConfig(kind="erk")
SHAPES = st.dictionaries(
    st.text("abc", min_size=1, max_size=4),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    min_size=1,
    max_size=12,
)


def erk_by_loop(shapes, density):
    """As JaxPruner does: solve, make all that came out above 1 dense, solve again."""
    dense = set()
    while True:
        budget = density * sum(math.prod(s) for s in shapes.values())
        budget -= sum(math.prod(shapes[name]) for name in dense)
        weight = sum(sum(shapes[name]) for name in shapes if name not in dense)
        factor = budget / weight if weight else 0.0
        above = {n for n, s in shapes.items() if factor * sum(s) / math.prod(s) > 1 + 1e-12}
        if not above - dense:
            break
        dense |= above
    return {n: 1.0 if n in dense else factor * sum(s) / math.prod(s) for n, s in shapes.items()}


@given(shapes=SHAPES, density=st.floats(0.05, 1.0))
def test_erk_meets_the_budget_and_is_the_loops(shapes, density):
    found = densities(ERK, shapes, density)
    total = sum(math.prod(s) for s in shapes.values())
    kept = sum(found[n] * math.prod(s) for n, s in shapes.items())
    assert kept == pytest.approx(density * total)
    assert all(0 < d <= 1 for d in found.values())
    assert found == pytest.approx(erk_by_loop(shapes, density))


def test_erk_by_hand_with_a_dense_matrix():
    """4 x 4 and 16 x 16 at 20 %: 54.4 of 272. Alone, factor 54.4 / 40 would keep 10.9 of 16 and
    43.5 of 256; at 40 %, 108.8: the small one is dense, the big one has the other 92.8."""
    shapes = {"big": (16, 16), "small": (4, 4)}
    low = densities(ERK, shapes, 0.2)
    assert low == pytest.approx({"small": 1.36 * 8 / 16, "big": 1.36 * 32 / 256})
    high = densities(ERK, shapes, 0.4)
    assert high == pytest.approx({"small": 1.0, "big": 92.8 / 256})


def test_stacked_experts_are_refused_for_erk_would_starve_them():
    """[64, 4d, d] as one tensor: (64 + 5d) / (64 * 4d * d), 1/63 of an expert's by itself."""
    d = 1024
    naive = (64 + 5 * d) / (64 * 4 * d * d)
    assert (5 * d) / (4 * d * d) / naive == pytest.approx(63.2, abs=0.05)
    with pytest.raises(ValueError, match="experts has shape .*; expected a matrix"):
        densities(ERK, {"experts": (64, 4 * d, d), "up": (4 * d, d)}, 0.1)
    apart = {f"expert{i}": (4 * d, d) for i in range(64)} | {"up": (4 * d, d)}
    assert list(densities(ERK, apart, 0.1).values()) == pytest.approx([0.1] * 65)


@given(shapes=SHAPES, share=st.floats(0.0, 1.0), low=st.floats(0.01, 0.3), high=st.floats(0.5, 1.0))
def test_floor_and_ceiling_hold_and_the_budget_too(shapes, share, low, high):
    density = low + (high - low) * share
    config = DistributionConfig(kind="erk", floor=low, ceiling=high)
    found = densities(config, shapes, density)
    assert all(low <= d <= high for d in found.values())
    total = sum(math.prod(s) for s in shapes.values())
    kept = sum(found[n] * math.prod(s) for n, s in shapes.items())
    assert kept == pytest.approx(density * total)


def test_floor_and_ceiling_make_way_on_the_way_down():
    config = DistributionConfig(kind="erk", floor=0.1, ceiling=0.5)
    shapes = {"big": (16, 16), "small": (4, 4)}
    assert densities(config, shapes, 0.8) == pytest.approx({"big": 0.8, "small": 0.8})
    assert densities(config, shapes, 0.4)["small"] == 0.5


@given(shapes=SHAPES, density=st.floats(0.05, 1.0), later=st.floats(0.05, 1.0))
def test_counts_have_the_exact_sum_and_only_fall(shapes, density, later):
    density, later = max(density, later), min(density, later)
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    first = counts(densities(ERK, shapes, density), sizes, sizes)
    assert abs(sum(first.values()) - density * sum(sizes.values())) <= 0.5 + 1e-6
    second = counts(densities(ERK, shapes, later), sizes, first)
    assert abs(sum(second.values()) - later * sum(sizes.values())) <= 0.5 + 1e-6
    assert all(second[n] <= first[n] for n in sizes)


@given(shapes=SHAPES, density=st.floats(0.05, 1.0), full=st.lists(st.floats(0.0, 1.0), min_size=12))
def test_what_finds_no_place_goes_to_those_with_room(shapes, density, full):
    """As after a first mask of another distribution."""
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    most = {n: round(f * size) for (n, size), f in zip(sizes.items(), full, strict=False)}
    found = counts(densities(ERK, shapes, density), sizes, most)
    assert all(0 <= found[n] <= most[n] for n in sizes)
    wanted = min(density * sum(sizes.values()), sum(most.values()))
    assert abs(sum(found.values()) - wanted) <= 0.5 + 1e-6


def test_pools():
    name = "model.layers.11.mlp.experts.3.up_proj.weight"
    assert pool_of("layer", name) == "model.layers.11"
    assert pool_of("global", name) == ""
    assert pool_of("layer", "lm_head.weight") == "lm_head.weight"
