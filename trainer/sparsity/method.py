"""SparsityMethod: the seam between a plan and the run that carries it out.

The one idea: a method is a pure function of the masks, the step and the seed. It keeps nothing of
its own, so a checkpoint holds masks and gradient sums alone, and a resumed run cannot differ.

Shapes: R rows that a rank owns, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gossamer.trainer.sparsity.flow import Flow
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Logical name -> full shape."""

Names = frozenset[str]

Reduce = Callable[[Tensor], object]
"""Sums an int64 tensor over the ranks of the replica, in place."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run stands."""

    step: int
    """Updates done, as the run counts them: skipped ones among them."""
    tokens: int = 0
    """Tokens learned from."""


@dataclass(frozen=True, slots=True)
class Horizon:
    """Where a run ends."""

    total_steps: int
    total_tokens: int | None = None


@dataclass(slots=True)
class Band:
    """Consecutive rows of one matrix, as this rank owns them; row_start is a multiple of 64."""

    name: str
    shape: tuple[int, ...]
    """Of the whole matrix."""
    row_start: int
    weight_RC: Tensor
    """float32 (or float64) masters."""
    mask_RC: Tensor
    """bool; True is kept."""
    gradient_RC: Tensor | None = None
    """Reduced dense gradients, before clipping, summed over the window. A step's loss is a mean
    over its tokens, so the sum weighs every token of an expert alike."""
    momentum_RC: Tensor | None = None
    """The optimizer's first moment."""
    tokens: int | None = None
    """That the expert saw in the window; None for what every token passes through, and where no
    gradient was asked for: there is no window then."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What is due once a step is done; without anything, nothing is."""

    updates: Names = frozenset()
    """Matrices whose masks are to be updated now."""
    scores: Names = frozenset()
    """Matrices whose dense gradient of the next step belongs to the window."""
    reset_moments: Names = frozenset()
    """Matrices all of whose moments become 0 now, after the update."""
    lr_factor: float = 1.0
    """Of the next step's learning rate."""


class SparsityMethod(Protocol):
    """A plan of one replica; every rank has one and makes the same calls."""

    def begin(self, shapes: Shapes, horizon: Horizon) -> list[str]:
        """Takes all logical tensors of the model; returns the names of those it governs, sorted.

        Called once. Raises ValueError for a plan that does not fit the model.
        """
        ...

    def step(self, point: Point) -> StepPlan:
        """What is due at `point`, before step number point.step + 1."""
        ...

    def target(self, point: Point) -> dict[str, float]:
        """Density that each governed matrix, or the pool it shares, is to have at `point`."""
        ...

    def update(
        self, bands: Sequence[Band], point: Point, reduce: Reduce, names: Names | None = None
    ) -> list[Tensor]:
        """New masks, bool, one a band. A collective call.

        bands: all rows this rank owns of the matrices `names`, which are those that are due, or
        some of them (None: all): with replicas those whose masked weights live on are asked for
        apart from the others. Where a run ends early, they are those whose end is still to come,
        and `point` is the end. Before the first step (point.step = 0) all masks are True.
        """
        ...

    def flow(self, name: str, point: Point) -> Flow:
        """How the governed matrix `name` takes part in step number point.step + 1."""
        ...
