"""The fitter finds the law that made its points. The authors' own 48 points (t5-data.csv) are not
here, so the points are made from the coefficients that they print."""

from itertools import product

import numpy as np
import pytest
from gossamer.trainer.sparsity.law import T5_C4, VIT_JFT, Law, fit, mean_terms, sparse_terms

SPARSITIES = (0.0, 0.5, 0.75, 0.875)
GRID = np.array(list(product(SPARSITIES, (1.3, 5.3, 21.0, 85.0), (2.5, 5.0, 10.0))))
"""As many points as the authors have: sparsity, non-zero parameters in millions, 1e5 steps."""


def test_the_printed_law_by_hand():
    """0 % sparse, 1e6 parameters, 1e5 steps: all powers are 1."""
    at_one = np.array([[0.0, 1.0, 1.0]])
    assert T5_C4.loss(at_one)[0] == pytest.approx(0.568 + 1.523 + 0.634 + 0.651)
    halved = T5_C4.loss(np.array([[0.5, 1.0, 1.0]]))[0]
    assert halved == pytest.approx(0.568 * 0.5**0.722 + 1.523 + 0.634 + 0.651)


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
