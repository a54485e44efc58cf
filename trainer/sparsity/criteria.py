"""Scores of weights: what is kept, and what grows.

The one idea: a criterion turns a band into one score an element and knows nothing of masks,
budgets or ranks; the greatest are kept, or grown.

Saliency |w g|: SNIP, Lee et al., 2019 (arXiv 1810.02340).
"""

from __future__ import annotations

from collections.abc import Callable

from gossamer.trainer.sparsity.method import Band
from gossamer.trainer.sparsity.selection import uniform
from torch import Tensor

Criterion = Callable[[Band, str], Tensor]
"""(band, draw) -> float scores [R, C], 0 or more. `draw` names the occasion, for what is random."""


def magnitude(band: Band, draw: str) -> Tensor:
    """|w|"""
    return band.weight_RC.abs()


def random(band: Band, draw: str) -> Tensor:
    """Uniform, and anew at every occasion."""
    rows, columns = band.weight_RC.shape
    score = uniform(band.name, band.row_start * columns, rows * columns, draw)
    return score.view(rows, columns).to(band.weight_RC.device)


def gradient(band: Band, draw: str) -> Tensor:
    """|g| of the dense gradient, summed over the window. Raises ValueError without one."""
    return _gradient(band).abs()


def saliency(band: Band, draw: str) -> Tensor:
    """|w g|. Raises ValueError without a gradient."""
    return (band.weight_RC * _gradient(band)).abs()


def momentum(band: Band, draw: str) -> Tensor:
    """|m|, the optimizer's first moment. Raises ValueError without one."""
    if band.momentum_RC is None:
        raise ValueError(f"{band.name} has no first moment; expected one for criterion momentum")
    return band.momentum_RC.abs()


def _gradient(band: Band) -> Tensor:
    if band.gradient_RC is None:
        raise ValueError(f"{band.name} comes without its window's gradient; expected one")
    return band.gradient_RC
