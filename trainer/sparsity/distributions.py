"""How a density is dealt out to matrices.

The one idea: a matrix's density is a common factor times its own weight, cut to [floor, ceiling];
the sum over matrices is piecewise linear in the factor, so the factor that meets the budget is
found exactly, and whatever would be above 1 is dense without a loop.

ER: Mocanu et al., 2018 (arXiv 1707.04780). ERK: Evci et al., 2020 (arXiv 1911.11134); for matrices
they are the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from gossamer.trainer.sparsity.config import DistributionConfig
from gossamer.trainer.sparsity.method import Shapes

POOLED = ("layer", "global")
"""Kinds by which the matrices of a pool compete for its budget."""

LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


def densities(config: DistributionConfig, shapes: Shapes, density: float) -> dict[str, float]:
    """Density of each matrix, so that together they keep `density` of all elements; of kinds that
    are pooled, `density` for each.

    Floor and ceiling hold as far as `density` lets them. Raises ValueError for what is no matrix.
    """
    if config.kind in POOLED:
        return dict.fromkeys(shapes, density)
    power = config.power if config.kind == "erk" else 0.0
    weights, sizes = [], []
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise ValueError(
                f"{name} has shape {tuple(shape)}; expected a matrix, experts each by itself"
            )
        rows, columns = shape
        sizes.append(rows * columns)
        weights.append(((rows + columns) / (rows * columns)) ** power)
    low, high = min(config.floor, density), max(config.ceiling, density)
    factor = _factor(weights, sizes, density * sum(sizes), low, high)
    return dict(zip(shapes, (min(max(factor * w, low), high) for w in weights), strict=True))


def _factor(
    weights: Sequence[float], sizes: Sequence[int], budget: float, low: float, high: float
) -> float:
    """The factor at which sum(sizes * clip(factor * weights, low, high)) is `budget`."""
    corners = sorted(
        [(low / w, w * n) for w, n in zip(weights, sizes, strict=True)]
        + [(high / w, -w * n) for w, n in zip(weights, sizes, strict=True)]
    )
    total, slope, at = low * sum(sizes), 0.0, 0.0
    for corner, bend in corners:
        if slope > 0.0 and total + slope * (corner - at) >= budget:
            return at + (budget - total) / slope
        total, slope, at = total + slope * (corner - at), slope + bend, corner
    return at


def counts(
    shares: Mapping[str, float], sizes: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, int]:
    """Whole numbers near shares x sizes, with the sum they should have; `most` is never exceeded.

    Each is rounded down; what is missing goes to the greatest remainders, and what finds no place
    under a `most`, to those with room, in proportion.
    """
    exact = {name: share * sizes[name] for name, share in shares.items()}
    # a share that was a whole number before it was a float is that number
    found = {name: min(math.floor(value + 1e-6), most[name]) for name, value in exact.items()}
    missing = round(math.fsum(exact.values())) - sum(found.values())
    order = sorted(exact, key=lambda name: (found[name] - exact[name], name))
    more = dict.fromkeys(order, 1)
    while missing > 0 and any(found[name] < most[name] for name in order):
        for name in order:
            taken = min(more[name], most[name] - found[name], missing)
            found[name], missing = found[name] + taken, missing - taken
        room = math.fsum(exact[name] for name in order if found[name] < most[name])
        more = {name: 1 + int(missing * exact[name] / room) if room else 1 for name in order}
    return found


def pool_of(kind: str, name: str) -> str:
    """The pool in which a matrix's weights compete: its own, its layer's, or that of all."""
    if kind == "global":
        return ""
    layer = LAYER.match(name) if kind == "layer" else None
    return layer[1] if layer else name
