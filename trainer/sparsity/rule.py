"""One rule of a plan over time: what is due, which densities, which flow.

The one idea: everything here follows from the point and the config; what becomes of the masks when
they are due is a Change (change.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from gossamer.trainer.import_path import resolve
from gossamer.trainer.sparsity.change import Change
from gossamer.trainer.sparsity.config import (
    CRITERIA,
    GRADIENT_CRITERIA,
    DistributionConfig,
    RuleConfig,
)
from gossamer.trainer.sparsity.criteria import Criterion, magnitude
from gossamer.trainer.sparsity.distributions import POOLED, densities
from gossamer.trainer.sparsity.flow import Flow, flow_at
from gossamer.trainer.sparsity.method import Band, Horizon, Point, Reduce, Shapes
from gossamer.trainer.sparsity.patterns import block, check_shape, frame_at
from gossamer.trainer.sparsity.schedules import density_at, position, window
from torch import Tensor


class Rule:
    """A RuleConfig with the matrices it has; `shapes` sorted by name."""

    def __init__(self, config: RuleConfig, shapes: Shapes, horizon: Horizon, seed: int) -> None:
        self.config, self.shapes, self._horizon, self._seed = config, shapes, horizon, seed
        for name, shape in shapes.items():
            check_shape(config.pattern, name, shape)
        blocks = {block(config.pattern, shape[1]) for shape in shapes.values()}
        for distribution in (config.distribution, config.initial.distribution):
            if distribution is not None and distribution.kind in POOLED and len(blocks) > 1:
                raise ValueError(
                    f"distribution.kind is {distribution.kind} with blocks of sizes"
                    f" {sorted(blocks)}; expected one size, for they compete"
                )
        self.window = window(config.schedule, horizon.total_steps)
        self.end_step = round(config.end.at * horizon.total_steps)
        self.rewarm_steps = round(config.end.rewarm * horizon.total_steps)
        self._keep_score = _criterion(config.criterion, "criterion")
        self._first_score = self._keep_score
        if _is_drawn(config):
            self._first_score = _criterion(config.initial.criterion, "initial.criterion")
        elif config.criterion in (*GRADIENT_CRITERIA, "momentum"):
            self._first_score = magnitude
        self._grow_score = self._keep_score
        if config.regrow.criterion != "none":
            self._grow_score = _criterion(config.regrow.criterion, "regrow.criterion")

    # --- what is due ----------------------------------------------------------------------------

    def is_over(self, point: Point) -> bool:
        """The end has come, and it changed something."""
        return self.config.end.kind != "freeze" and point.step >= self.end_step

    def is_due(self, point: Point) -> bool:
        """Masks are to be updated at `point`."""
        step, every = point.step, self.config.schedule.every_steps
        if step == 0 or (step == self.end_step and self.is_over(point)):
            return True
        if step > self.end_step or step % every:
            return False
        x = self._position(point)
        if self.config.flow.kind != "masked":
            return x >= self.window.start
        before = x - every
        return (
            self.config.schedule.unit == "tokens"  # the step before was at no known position
            or self._density(x) != self._density(before)
            or self._frame(x) != self._frame(before)
            or self._grows(x)
        )

    def wants_gradient(self, point: Point) -> bool:
        """The dense gradient of the step after `point` counts for the next update."""
        every, regrow = self.config.schedule.every_steps, self.config.regrow
        used = {regrow.criterion, self.config.criterion} - {"none"}
        if not any(c in GRADIENT_CRITERIA or c not in CRITERIA for c in used):
            return False
        event = (point.step // every + 1) * every
        if self.config.end.kind == "prune" and point.step < self.end_step:
            event = min(event, self.end_step)
        return event - point.step <= regrow.window_steps and self.is_due(
            Point(event, point.tokens * event // max(point.step, 1))
        )

    def target(self, point: Point) -> dict[str, float]:
        """See SparsityMethod."""
        if self.is_over(point) and self.config.end.kind == "densify":
            return dict.fromkeys(self.shapes, 1.0)
        point = self._until_end(point)
        x, pattern = self._position(point), self.config.pattern
        if pattern.kind == "n_m":
            frame = self._frame(x)
            return dict.fromkeys(self.shapes, frame[0] / frame[1] if frame else 1.0)
        return densities(self._distribution(point), self.shapes, self._density(x))

    def flow(self, point: Point) -> Flow:
        """See SparsityMethod."""
        if self.is_over(point):
            return Flow()
        first, last = self.window.start, self.window.stop
        share = (self._position(point) - first) / (last - first) if last > first else 1.0
        return flow_at(self.config.flow, point.step + 1, self._horizon.total_steps, share)

    def _until_end(self, point: Point) -> Point:
        """`point`, or the last change where none comes after it any more."""
        every, last = self.config.schedule.every_steps, self.end_step
        if self.config.end.kind == "freeze":
            last = last // every * every
        if point.step <= last:
            return point
        return Point(last, point.tokens * last // point.step)

    def _distribution(self, point: Point) -> DistributionConfig:
        first = self.config.initial.distribution
        return first if point.step == 0 and first else self.config.distribution

    def _position(self, point: Point) -> float:
        return position(self.config.schedule, point, self._horizon)

    def _density(self, x: float) -> float:
        return density_at(self.config.schedule, self.window, x)

    def _frame(self, x: float) -> tuple[int, int] | None:
        pattern = self.config.pattern
        return frame_at(pattern, self.window, x) if pattern.kind == "n_m" else None

    def _grows(self, x: float) -> bool:
        regrow = self.config.regrow
        stop = regrow.stop * self._horizon.total_steps
        return regrow.criterion != "none" and max(0.0, self.window.start) < x < stop

    def drop_share(self, x: float) -> float:
        """Share of the kept weights that is traded once x steps are done."""
        regrow = self.config.regrow
        if regrow.anneal == "constant":
            return regrow.share
        angle = math.pi * x / (regrow.stop * self._horizon.total_steps)
        return regrow.final_share + (regrow.share - regrow.final_share) / 2 * (1 + math.cos(angle))

    # --- update ---------------------------------------------------------------------------------

    def update(self, bands: Sequence[Band], point: Point, reduce: Reduce) -> list[Tensor]:
        """See SparsityMethod; `bands` are of this rule's matrices."""
        x = self._position(point)
        if self.is_over(point) and self.config.end.kind == "densify":
            return [torch.ones_like(band.mask_RC) for band in bands]
        change = Change(
            bands=bands,
            shapes=self.shapes,
            pattern=self.config.pattern,
            distribution=self._distribution(point),
            density=self._density(x),
            lives=self.config.flow.kind != "masked",
            draw=f"mask {self._seed} {point.step}",
            reduce=reduce,
        )
        score = self._score(bands, point)
        if self.config.pattern.kind == "n_m":
            frame = self._frame(x)
            return change.groups(score, *frame) if frame else change.dense()
        masks = change.prune(score)
        if self._grows(x):
            regrow, share = self.config.regrow, self.drop_share(x)
            masks = change.trade(masks, self._keep_score, self._grow_score, share, regrow)
        return change.elements(masks)

    def _score(self, bands: Sequence[Band], point: Point) -> Criterion:
        """What weights are kept by now."""
        if point.step == 0:
            return self._first_score
        if self.config.flow.kind != "masked" and self.config.criterion in GRADIENT_CRITERIA:
            if any(band.gradient_RC is None for band in bands):  # a replica that comes late
                return magnitude
        return self._keep_score


def _is_drawn(config: RuleConfig) -> bool:
    """The first mask is there from the beginning, rather than the first change of a dense one."""
    schedule, pattern = config.schedule, config.pattern
    if config.flow.kind != "masked":
        return False
    if schedule.kind != "static":
        return schedule.initial_density < 1.0
    return pattern.kind != "n_m" or (pattern.decay == "none" and schedule.start == 0.0)


def _criterion(name: str, field: str) -> Criterion:
    return resolve(name, CRITERIA, field)
