"""The fitter finds the law that made its points, and one for the authors' own 48 points
(t5_c4_points.csv) that is nearer to them than the one that they print."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from gossamer.trainer.sparsity.law import T5_C4, VIT_JFT, Law, fit, mean_terms, sparse_terms

SPARSITIES = (0.0, 0.5, 0.75, 0.875)
GRID = np.array(list(product(SPARSITIES, (1.3, 5.3, 21.0, 85.0), (2.5, 5.0, 10.0))))
"""As many points as the authors have: sparsity, non-zero parameters in millions, 1e5 steps."""
SPARSITY, SIZE, T5_LOSS, STEPS = np.loadtxt(
    Path(__file__).with_name("t5_c4_points.csv"), delimiter=","
).T
BASE_WEIGHTS = 24 * 12 * 768**2
T5 = np.stack([SPARSITY, BASE_WEIGHTS * SIZE * (1 - SPARSITY) / 1e6, STEPS / 1e5], axis=1)


def huber(error: np.ndarray) -> float:
    """The authors' objective, of differences of log losses."""
    size, bend = np.abs(error), 0.001
    return float(np.where(size > bend, bend * (size - bend / 2), error**2 / 2).mean())


def test_the_printed_law_by_hand():
    """0 % sparse, 1e6 parameters, 1e5 steps: all powers are 1."""
    at_one = np.array([[0.0, 1.0, 1.0]])
    assert T5_C4.loss(at_one)[0] == pytest.approx(0.568 + 1.523 + 0.634 + 0.651)
    halved = T5_C4.loss(np.array([[0.5, 1.0, 1.0]]))[0]
    assert halved == pytest.approx(0.568 * 0.5**0.722 + 1.523 + 0.634 + 0.651)


def test_the_printed_law_is_as_near_to_the_authors_points_as_they_say():
    error = np.log(T5_C4.loss(T5) / T5_LOSS)
    assert len(error) == 48
    assert np.abs(error).mean() == pytest.approx(0.0081, abs=5e-5)
    assert np.abs(error).max() == pytest.approx(0.027, abs=5e-4)
    assert huber(error) == pytest.approx(7.6e-6, abs=5e-8)


@pytest.mark.parametrize("start", [0.2, 0.5, 1.0])
def test_the_fit_to_the_authors_points_is_nearer_than_theirs(start):
    """By their objective too. The run that they kept back it foretells less well."""
    law = fit(sparse_terms, T5, T5_LOSS, np.full(3, start))
    assert law.exponents == pytest.approx([1.369, 0.229, 0.338], abs=1e-3)
    assert law.coefficients == pytest.approx([0.433, 1.708, 0.453, 0.780], abs=1e-3)
    error, printed = (np.log(each.loss(T5) / T5_LOSS) for each in (law, T5_C4))
    assert np.abs(error).mean() < 0.0055 and np.abs(error).max() < 0.017
    assert huber(error) < 0.65 * huber(printed)
    kept_back = np.array([[0.75, 48 * 12 * 1024**2 / 1e6, 5.0]])
    assert law.loss(kept_back)[0] / 1.48278 == pytest.approx(0.979, abs=1e-3)
    assert T5_C4.loss(kept_back)[0] / 1.48278 == pytest.approx(0.991, abs=1e-3)


@pytest.mark.parametrize("law", [T5_C4, VIT_JFT], ids=["t5", "vit"])
def test_the_fitter_finds_the_law_of_exact_points(law):
    found = fit(sparse_terms, GRID, law.loss(GRID), np.array([0.5, 0.5, 0.5]))
    assert found.exponents == pytest.approx(law.exponents, rel=1e-3)
    assert found.coefficients == pytest.approx(law.coefficients, rel=1e-3)


def test_of_noisy_points_it_is_as_near_as_the_noise():
    noise = np.random.default_rng(0).normal(0.0, 0.008, len(GRID))
    found = fit(sparse_terms, GRID, T5_C4.loss(GRID) * np.exp(noise), np.array([0.5, 0.5, 0.5]))
    assert np.abs(np.log(found.loss(GRID) / T5_C4.loss(GRID))).mean() < 0.008


def test_the_law_of_mean_parameters():
    law = Law(mean_terms, np.array([0.34, 0.28]), np.array([406.4, 410.7, 1.69]))
    grid = np.array(list(product((58e6, 162e6, 468e6), (1e9, 4e9, 16e9))))
    found = fit(mean_terms, grid, law.loss(grid), np.array([0.5, 0.5]))
    assert found.exponents == pytest.approx(law.exponents, rel=1e-3)
    assert found.loss(grid) == pytest.approx(law.loss(grid), rel=1e-6)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="6 points; expected at least the 7 numbers of the law"):
        fit(sparse_terms, GRID[:6], T5_C4.loss(GRID[:6]), np.array([0.5, 0.5, 0.5]))
