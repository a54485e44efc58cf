"""Engine: the seam between the loop and whoever owns parameters, gradients and optimizer state.

The one idea: everything that leaves or enters the training state (checkpoints, weight deltas, outer
sync, re-placement) speaks of rows of logical tensors under HF names, so nobody but the engine knows
how the state is sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from gossamer.parallel.masks import Masks

BAND_ROWS = 64
"""Rows of a logical matrix that always have one owner; a vector has one owner as a whole."""


@dataclass(frozen=True, slots=True)
class Owned:
    """Rows [row_start, row_stop) of the logical tensor `name` of full `shape`."""

    name: str
    shape: tuple[int, ...]
    row_start: int
    row_stop: int
    master: Tensor
    """float32 (or float64) master weights, [rows, ...]."""
    moments: dict[str, Tensor]
    """Optimizer moments by name (exp_avg, exp_avg_sq), [rows, ...]; empty before the first step.
    Of what has a mask, asked for with moments, also mask (bool) and window (see Masks)."""
    weight: Tensor | None = None
    """float32, what the forward pass sees, where that is not the master (see Masks)."""


ReadRows = Callable[[str, int, int], Owned]
"""(name, row_start, row_stop) -> those rows, wherever they are read from."""

LogicalSegments = dict[str, list[tuple[str, tuple[int, ...]]]]
"""Parameter name -> the logical tensors (name, shape) it is made of, in memory order."""

ENGINES = {"deepspeed": "gossamer.parallel.deepspeed_engine:DeepSpeedEngine"}


class Engine(Protocol):
    """Backward, optimizer step and the training state of one rank."""

    module: nn.Module
    """Call this, not the bare model: the engine may have to see every forward pass."""
    num_updates: int
    """Optimizer steps taken; Adam's bias correction depends on it, so a checkpoint holds it."""
    masks: Masks
    """Which weights live, held beside the masters; does nothing unless it is told to."""
    on_gradient: Callable[[list[Owned]], None] | None
    """Called by `step` with the summed gradient of the rows this rank owns (as `master`, float32 on
    the CPU), before its norm is taken; what it leaves there is the gradient. ZeRO-0 alone."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds the gradients of `loss` (this rank's share of a global SUM); reduces if last."""
        ...

    def step(self, lr: float, max_norm: float) -> float:
        """Clips the summed gradient to max_norm (0 = no clipping), updates, returns its norm.

        Raises FloatingPointError, on all ranks, with nothing updated and the gradient dropped, when
        it is not finite.
        """
        ...

    def owned(self, with_moments: bool) -> Iterator[Owned]:
        """Every row this rank owns; over all ranks each row exactly once. A collective call."""
        ...

    def write(self, read: ReadRows, num_updates: int | None) -> None:
        """Overwrites masters, moments and weights with what `read` returns. A collective call.

        Each rank reads what it holds. With num_updates None masters and weights alone: each rank
        reads what it owns, as `owned` says, and hands it to the others that hold it.
        """
        ...

    def move(self, before: Sequence[LogicalSegments], after: Sequence[LogicalSegments]) -> int:
        """Brings logical tensors, with all that is held of them, to other places between steps.

        `before` and `after` say of each expert rank which logical tensors its parameters are made
        of; every name of `before` is in `after`. Returns the bytes that this rank sent to others.
        A collective call. Raises ValueError, with nothing moved, for another `before` than is
        held, or names that do not match.
        """
        ...
