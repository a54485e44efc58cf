"""Shapes of masks: n of every m columns, blocks, or any.

The one idea: groups and blocks lie inside the 64-row bands that one rank owns, so n:m is local and
exact, and blocks are elements of a smaller matrix.

Structure decay: Progressive Gradient Flow, Bambhaniya et al., 2024 (arXiv 2402.04744).
"""

from __future__ import annotations

import torch
from gossamer.trainer.sparsity.config import PatternConfig
from gossamer.trainer.sparsity.schedules import Window
from torch import Tensor

KEPT_KEY = 2**31 - 1
GEOMETRIC_FRAMES = 4


def frames(pattern: PatternConfig) -> list[tuple[int, int]]:
    """The (n, m) that a pattern n_m goes through."""
    n, m = pattern.n, pattern.m
    if pattern.decay == "geometric":
        return [(n << k, m << k) for k in reversed(range(GEOMETRIC_FRAMES))]
    if pattern.decay == "stepwise":
        halvings = (m // n).bit_length() - 1
        return [(m - 1, m)] + [(m >> k, m) for k in range(1, halvings + 1)]
    return [(n, m)]


def frame_at(pattern: PatternConfig, within: Window, x: float) -> tuple[int, int] | None:
    """The (n, m) once x steps are done; None, dense, before start."""
    found = frames(pattern)
    if x < within.start:
        return None
    if len(found) == 1 or x >= within.stop:
        return found[-1]
    return found[int((x - within.start) / (within.stop - within.start) * len(found))]


def check_shape(pattern: PatternConfig, name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a matrix that groups or blocks do not divide."""
    rows, columns = shape
    if pattern.kind in ("n_m", "n_m_floor"):
        m = max(m for _, m in frames(pattern))
        if columns % m:
            raise ValueError(f"{name} has {columns} columns; expected a multiple of m={m}")
    if pattern.kind == "block":
        height, width = block(pattern, columns)
        if rows % height or columns % width:
            raise ValueError(
                f"{name} is {rows} x {columns}; expected whole blocks of {height} x {width}"
            )


def block(pattern: PatternConfig, columns: int) -> tuple[int, int]:
    """(rows, columns) of what is kept or not as one; (1, 1) but for blocks."""
    if pattern.kind != "block":
        return 1, 1
    return pattern.block_rows, pattern.block_columns or columns


def best_of_groups(keys_RC: Tensor, n: int, m: int) -> Tensor:
    """bool: the n greatest keys of every m columns; of equal ones the first. -1 is never taken."""
    rows, columns = keys_RC.shape
    groups = keys_RC.view(rows, columns // m, m)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask = keys_RC.new_zeros(groups.shape, dtype=torch.bool).scatter_(-1, best, True)
    return mask.view(rows, columns) & (keys_RC >= 0)


def with_floor(keys_RC: Tensor, n: int, m: int) -> Tensor:
    """Keys of which the n greatest of every m come before all others."""
    return keys_RC.masked_fill(best_of_groups(keys_RC, n, m), KEPT_KEY)


def block_scores(score_RC: Tensor, height: int, width: int) -> Tensor:
    """Sum of each block, added in a fixed order so that it does not depend on the band's size."""
    rows, columns = score_RC.shape
    parts = score_RC.view(rows // height, height, columns // width, width)
    parts = parts.transpose(1, 2).reshape(rows // height, columns // width, height * width)
    while parts.shape[-1] > 1:
        half = parts.shape[-1] // 2
        rest = parts[..., 2 * half :]
        parts = parts[..., :half] + parts[..., half : 2 * half]
        if rest.shape[-1]:
            parts[..., :1] += rest
    return parts[..., 0]


def spread(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask of blocks as one of elements."""
    return mask.repeat_interleave(height, 0).repeat_interleave(width, 1)
