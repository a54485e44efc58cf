"""Scaling laws of sparse training, fitted to runs of one's own.

The one idea: both laws are linear in all but their exponents, so for given exponents the rest is
one least-squares solve, and the search is over two or three numbers only.

By non-zero parameters: Frantar et al., 2023 (arXiv 2309.08520). By the mean number of parameters
over training: Jin et al., 2025 (arXiv 2501.12486), whose constants are not published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Terms = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(points [P, ...], exponents [X]) -> [P, K], what the K coefficients are multiplied with."""


def sparse_terms(points: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Of L = (a (1-S)^b + c) N^-d + e D^-f + g: points are (S, N, D), exponents b, d, f,
    coefficients a, c, e, g. S sparsity, N non-zero parameters, D data, in any units."""
    sparsity, parameters, data = points.T
    b, d, f = exponents
    scale = parameters**-d
    return np.stack([(1 - sparsity) ** b * scale, scale, data**-f, np.ones_like(data)], axis=1)


def mean_terms(points: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Of L = A M^-alpha + B D^-beta + E: points are (M, D), exponents alpha, beta, coefficients A,
    B, E. M mean number of parameters over the run's steps, D data."""
    parameters, data = points.T
    alpha, beta = exponents
    return np.stack([parameters**-alpha, data**-beta, np.ones_like(data)], axis=1)


@dataclass(frozen=True, slots=True)
class Law:
    """A fitted or a published law."""

    terms: Terms
    exponents: np.ndarray
    coefficients: np.ndarray

    def loss(self, points: np.ndarray) -> np.ndarray:
        """The law's loss at each point, [P]."""
        return self.terms(points, self.exponents) @ self.coefficients


# as printed in the authors' notebook; N in millions, D in 1e5 steps (T5) or in 1e9 images (ViT)
T5_C4 = Law(sparse_terms, np.array([0.722, 0.245, 0.203]), np.array([0.568, 1.523, 0.634, 0.651]))
VIT_JFT = Law(sparse_terms, np.array([0.821, 0.392, 0.890]), np.array([1.305, 2.075, 0.278, 4.517]))


def fit(terms: Terms, points: np.ndarray, losses: np.ndarray, start: np.ndarray) -> Law:
    """Least squares of relative errors, by Levenberg and Marquardt over the exponents.

    points: [P, ...], losses: [P], start: [X], all above 0. Raises ValueError for fewer points than
    the law has numbers.
    """
    exponents = np.array(start, dtype=np.float64)
    numbers = len(exponents) + terms(points[:1], exponents).shape[1]
    if len(points) < numbers:
        raise ValueError(
            f"{len(points)} points; expected at least the {numbers} numbers of the law"
        )

    def solve(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        matrix = terms(points, exponents) / losses[:, None]
        coefficients = np.linalg.lstsq(matrix, np.ones_like(losses), rcond=None)[0]
        return coefficients, matrix @ coefficients - 1.0

    damping, (coefficients, error) = 1e-3, solve(exponents)
    for _ in range(200):
        nudges = np.eye(len(exponents)) * 1e-6
        slope = np.stack([(solve(exponents + n)[1] - error) / 1e-6 for n in nudges], axis=1)
        square = slope.T @ slope
        move = np.linalg.solve(
            square + damping * np.diag(square.diagonal() + 1e-12), -slope.T @ error
        )
        tried = solve(np.abs(exponents + move))
        if tried[1] @ tried[1] < error @ error:
            exponents, damping = np.abs(exponents + move), damping / 3
            coefficients, error = tried
        else:
            damping *= 4
        if np.abs(move).max() < 1e-12:
            break
    return Law(terms, exponents, coefficients)
