"""Sums of squares have the same bits however they are cut, and lose less than a plain sum."""

import math

import pytest
import torch
from gossamer.parallel.exact_norm import SquareSums
from hypothesis import given
from hypothesis import strategies as st


def numbers(seed: int, count: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, generator=generator) ** 9  # a few are far above the others
    return (torch.randn(count, generator=generator) * spread * scale).to(dtype)


@given(
    st.integers(0, 99),
    st.integers(1, 5000),
    st.sampled_from([1e-18, 1e-4, 1.0, 1e15]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.lists(st.integers(0, 5000), max_size=4),
    st.integers(1, 1000),
)
def test_no_cut_and_no_order_changes_a_bit(seed, count, scale, dtype, cuts, room):
    x = numbers(seed, count, scale, dtype)
    squares = SquareSums(float(x.abs().max()), count * room)
    shuffled = x[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    parts = [squares.of(shuffled[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.stack(parts).sum(0), squares.of(x))
    exact = math.fsum(value * value for value in x.double().tolist())
    assert float(squares.of(x).sum()) == pytest.approx(exact, rel=1e-15, abs=0.0)


def test_a_plain_sum_does_change_with_the_cut():
    x = numbers(0, 5000, 1.0, torch.float32).double().square()
    found = {float(x[:cut].sum() + x[cut:].sum()) for cut in range(1, 5000, 100)}
    squares = SquareSums(float(x.sqrt().max()), 5000)
    ours = {
        float((squares.of(x[:cut].sqrt()) + squares.of(x[cut:].sqrt())).sum())
        for cut in range(1, 5000, 100)
    }
    assert len(found) > 1 and len(ours) == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    x = torch.tensor([1.0, bad])
    for most in (bad, 1.0):
        assert not math.isfinite(float(SquareSums(most, 2).of(x).sum()))


def test_zeros_are_zero():
    assert SquareSums(0.0, 3).of(torch.zeros(3)).tolist() == [0.0, 0.0]
    assert SquareSums(0.0, 1).of(torch.zeros(0)).tolist() == [0.0, 0.0]
