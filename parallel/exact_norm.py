"""Sums of squares that do not depend on how the elements are cut and ordered.

The one idea: numbers that are all multiples of one unit, and few enough of it, add up without any
rounding, so in any order to the same bits. Each square is split into a high and a low part, each
rounded to a unit of its own that leaves room for the sum; what is lost is below 2^-100 of the
largest square times the number of elements squared.

Demmel and Nguyen, "Parallel reproducible summation", 2015.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SquareSums:
    """Adds squares of numbers of which none is above `most`, at most `num_elements` in one sum."""

    def __init__(self, most: float, num_elements: int) -> None:
        room = max(2, math.ceil(math.log2(num_elements))) - 53
        square = math.frexp(most)[1] * 2  # every square is below 2^square
        self._anchors = tuple(
            1.5 * math.ldexp(1.0, max(-1020, min(970, unit)) + 52)
            for unit in (square + room, square + 2 * room - 1)
        )

    def of(self, x: Tensor) -> Tensor:
        """[high, low], float64: their sum is that of x^2, and they may be added up as they are."""
        rest, parts = x.double().square(), []
        for anchor in self._anchors:  # so large that adding it rounds to the unit
            part = (rest + anchor) - anchor
            rest = rest - part
            parts.append(part.sum())
        return torch.stack(parts)
