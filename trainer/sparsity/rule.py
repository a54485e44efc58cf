"""One rule of a plan, at work on the matrices it matches.

The one idea: a change of masks is at most two acts, prune to the target density and trade weights
at that density; every method is some choice of scores and budgets for them.

SET: Mocanu et al., 2018 (arXiv 1707.04780). RigL: Evci et al., 2020 (arXiv 1911.11134). GraNet: Liu
et al., 2021 (arXiv 2106.10404).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from gossamer.parallel.engine import BAND_ROWS
from gossamer.trainer.import_path import resolve
from gossamer.trainer.sparsity.config import (
    CRITERIA,
    GRADIENT_CRITERIA,
    DistributionConfig,
    RuleConfig,
)
from gossamer.trainer.sparsity.criteria import Criterion
from gossamer.trainer.sparsity.distributions import counts, densities, pool_of
from gossamer.trainer.sparsity.flow import Flow, flow_at
from gossamer.trainer.sparsity.method import Band, Horizon, Point, Reduce, Shapes
from gossamer.trainer.sparsity.patterns import (
    KEPT_KEY,
    best_of_groups,
    block,
    block_scores,
    check_shape,
    frame_at,
    spread,
    with_floor,
)
from gossamer.trainer.sparsity.schedules import density_at, position, window
from gossamer.trainer.sparsity.selection import Piece, score_keys, select
from torch import Tensor

Keys = Callable[[], Tensor]

POOLED = ("layer", "global")
"""Distributions by which the matrices of a pool compete."""


class Rule:
    """A RuleConfig with the matrices it has; `shapes` sorted by name."""

    def __init__(self, config: RuleConfig, shapes: Shapes, horizon: Horizon, seed: int) -> None:
        self.config, self.shapes, self._horizon, self._seed = config, shapes, horizon, seed
        self._blocks = {n: block(config.pattern, shape[1]) for n, shape in shapes.items()}
        for name, shape in shapes.items():
            check_shape(config.pattern, name, shape)
        self._sizes = {
            n: math.prod(shape) // math.prod(self._blocks[n]) for n, shape in shapes.items()
        }
        self.window = window(config.schedule, horizon)
        self.end_step = round(config.end.at * horizon.total_steps)
        self._keep_score = _criterion(config.criterion, "criterion")
        self._first_score = self._keep_score
        if config.flow.kind == "masked":
            self._first_score = _criterion(config.initial.criterion, "initial.criterion")
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
        return event - point.step <= regrow.window_steps and self.is_due(
            Point(event, point.tokens * event // max(point.step, 1))
        )

    def target(self, point: Point) -> dict[str, float]:
        """See SparsityMethod."""
        if self.is_over(point) and self.config.end.kind == "densify":
            return dict.fromkeys(self.shapes, 1.0)
        x, pattern = self._position(point), self.config.pattern
        if pattern.kind == "n_m":
            frame = self._frame(x)
            return dict.fromkeys(self.shapes, frame[0] / frame[1] if frame else 1.0)
        return self._densities(point, self._density(x))

    def flow(self, point: Point) -> Flow:
        """See SparsityMethod."""
        if self.is_over(point):
            return Flow()
        first, last = self.window.start, self.window.stop
        share = (self._position(point) - first) / (last - first) if last > first else 1.0
        return flow_at(self.config.flow, point.step + 1, self._horizon.total_steps, share)

    def _densities(self, point: Point, density: float) -> dict[str, float]:
        distribution = self._distribution(point)
        if distribution.kind in POOLED or density == 1.0:
            return dict.fromkeys(self.shapes, density)
        return densities(distribution, self.shapes, density)

    def _distribution(self, point: Point) -> DistributionConfig:
        first = self.config.initial.distribution
        return first if point.step == 0 and first else self.config.distribution

    def _position(self, point: Point) -> float:
        return position(self.config.schedule, point, self._horizon)

    def _density(self, x: float) -> float:
        return density_at(self.config.schedule, self.window, x)

    def _frame(self, x: float) -> tuple[int, int] | None:
        return frame_at(self.config.pattern, self.window, x)

    def _grows(self, x: float) -> bool:
        regrow = self.config.regrow
        stop = regrow.stop * self._horizon.total_steps
        return regrow.criterion != "none" and max(0.0, self.window.start) < x < stop

    # --- update ---------------------------------------------------------------------------------

    def update(self, bands: Sequence[Band], point: Point, reduce: Reduce) -> list[Tensor]:
        """See SparsityMethod; `bands` are of this rule's matrices."""
        x = self._position(point)
        if self.is_over(point) and self.config.end.kind == "densify":
            return [torch.ones_like(band.mask_RC) for band in bands]
        if self.config.pattern.kind == "n_m":
            return [self._groups(band, point) for band in bands]
        masks = self._prune(bands, self._units(bands), point, reduce)
        if self._grows(x):
            masks = self._trade(bands, masks, point, reduce)
        return [spread(m, *self._blocks[b.name]) for b, m in zip(bands, masks, strict=True)]

    def _groups(self, band: Band, point: Point) -> Tensor:
        frame = self._frame(self._position(point))
        if frame is None:
            return torch.ones_like(band.mask_RC)
        keys = self._keys(self._score_at(point), band, self._candidates(band, point), point, "keep")
        return best_of_groups(keys, *frame)

    def _prune(
        self, bands: Sequence[Band], masks: list[Tensor], point: Point, reduce: Reduce
    ) -> list[Tensor]:
        """Masks of the target density: the best of the kept, or of all where all live."""
        density = self._density(self._position(point))
        if density == 1.0:
            return [torch.ones_like(mask) for mask in masks]
        lives = self.config.flow.kind != "masked"
        kept = self._sizes if lives else self._count(bands, masks, reduce)[0]
        distribution, pools = self._distribution(point), {name: name for name in self.shapes}
        shares = self._densities(point, density)
        is_pooled = distribution.kind in POOLED
        if is_pooled:
            pools = {name: pool_of(distribution.kind, name) for name in self.shapes}
            shares = dict.fromkeys(pools.values(), density)
        most = _summed(kept, pools)
        keep = counts(shares, _summed(self._sizes, pools), most)
        if not lives and keep == most:
            return masks
        if lives:
            masks = [torch.ones_like(mask) for mask in masks]
        score = self._score_at(point)
        keys: list[Keys] = [
            partial(self._keys, score, b, m, point, "keep")
            for b, m in zip(bands, masks, strict=True)
        ]
        if self.config.pattern.kind == "n_m_floor":
            n, m = self.config.pattern.n, self.config.pattern.m
            keys = [partial(_floored, key, n, m) for key in keys]
        if is_pooled:
            keys = self._bounded(bands, keys, kept, point, reduce)
        return self._select(bands, keys, pools, keep, reduce)

    def _bounded(
        self,
        bands: Sequence[Band],
        keys: list[Keys],
        kept: dict[str, int],
        point: Point,
        reduce: Reduce,
    ) -> list[Keys]:
        """Keys by which no pool takes less than floor of a matrix, or more than ceiling."""
        distribution, own = self._distribution(point), {name: name for name in self.shapes}
        density = self._density(self._position(point))
        floor, ceiling = distribution.floor, distribution.ceiling
        if floor > 0.0:
            least = {
                n: min(kept[n], math.ceil(floor * size), math.floor(density * size))
                for n, size in self._sizes.items()
            }
            first = self._select(bands, keys, own, least, reduce)
            keys = [partial(_protected, k, f) for k, f in zip(keys, first, strict=True)]
        if ceiling < 1.0:
            most = {
                n: min(kept[n], max(math.floor(ceiling * size), math.ceil(density * size)))
                for n, size in self._sizes.items()
            }
            allowed = self._select(bands, keys, own, most, reduce)
            keys = [partial(_only, k, a) for k, a in zip(keys, allowed, strict=True)]
        return keys

    def _trade(
        self, bands: Sequence[Band], masks: list[Tensor], point: Point, reduce: Reduce
    ) -> list[Tensor]:
        """Drops the worst share of every matrix's kept weights and grows as many elsewhere; what
        was just dropped may come back."""
        regrow, own = self.config.regrow, {name: name for name in self.shapes}
        kept, is_cold = self._count(bands, masks, reduce)
        share = self.drop_share(self._position(point))
        whole = math.floor if regrow.rounding == "down" else math.ceil
        drop = {n: 0 if is_cold[n] else min(k, whole(share * k)) for n, k in kept.items()}
        keep = {name: kept[name] - drop[name] for name in kept}
        keys: list[Keys] = [
            partial(self._keys, self._keep_score, b, m, point, "trade")
            for b, m in zip(bands, masks, strict=True)
        ]
        stay = self._select(bands, keys, own, keep, reduce)
        grow: list[Keys] = [
            partial(self._keys, self._grow_score, b, ~s, point, "grow")
            for b, s in zip(bands, stay, strict=True)
        ]
        new = self._select(bands, grow, own, drop, reduce)
        return [s | n for s, n in zip(stay, new, strict=True)]

    def drop_share(self, x: float) -> float:
        """Share of the kept weights that is traded once x steps are done."""
        regrow = self.config.regrow
        if regrow.anneal == "constant":
            return regrow.share
        angle = math.pi * x / (regrow.stop * self._horizon.total_steps)
        return regrow.final_share + (regrow.share - regrow.final_share) / 2 * (1 + math.cos(angle))

    # --- pieces of it ---------------------------------------------------------------------------

    def _score_at(self, point: Point) -> Criterion:
        return self._first_score if point.step == 0 else self._keep_score

    def _candidates(self, band: Band, point: Point) -> Tensor:
        return band.mask_RC if self.config.flow.kind == "masked" else torch.ones_like(band.mask_RC)

    def _units(self, bands: Sequence[Band]) -> list[Tensor]:
        """Masks with one element a block."""
        blocks = [self._blocks[band.name] for band in bands]
        return [b.mask_RC[::h, ::w] for b, (h, w) in zip(bands, blocks, strict=True)]

    def _keys(
        self, score: Criterion, band: Band, candidates: Tensor, point: Point, act: str
    ) -> Tensor:
        scores = score(band, f"mask {self._seed} {point.step} {act}")
        keys = score_keys(block_scores(scores, *self._blocks[band.name]), band.name)
        return keys.masked_fill(~candidates, -1)

    def _count(
        self, bands: Sequence[Band], masks: Sequence[Tensor], reduce: Reduce
    ) -> tuple[dict[str, int], dict[str, bool]]:
        """(kept units, is an expert without tokens) of each matrix, over all ranks."""
        index = {name: i for i, name in enumerate(self.shapes)}
        found = torch.zeros(2, len(index), dtype=torch.int64)
        for band, mask in zip(bands, masks, strict=True):
            found[0, index[band.name]] += int(mask.sum())
            if band.tokens is not None and band.tokens < self.config.regrow.min_tokens:
                found[1, index[band.name]] = 1
        reduce(found)
        kept, cold = found.tolist()
        return dict(zip(index, kept, strict=True)), dict(zip(index, map(bool, cold), strict=True))

    def _select(
        self,
        bands: Sequence[Band],
        keys: Sequence[Keys],
        pools: dict[str, str],
        keep: dict[str, int],
        reduce: Reduce,
    ) -> list[Tensor]:
        """The keep[pool] greatest keys of each pool; see select()."""
        order = sorted(pools, key=lambda name: (pools[name], name))
        indices = {pool: i for i, pool in enumerate(sorted(keep))}
        slots, slots_P = {}, torch.zeros(len(indices), dtype=torch.int64)
        for name in order:
            slots[name] = int(slots_P.sum())
            slots_P[indices[pools[name]]] += -(-self.shapes[name][0] // BAND_ROWS)
        pieces = [
            Piece(indices[pools[b.name]], slots[b.name] + b.row_start // BAND_ROWS, key)
            for b, key in zip(bands, keys, strict=True)
        ]
        return select(pieces, torch.tensor([keep[pool] for pool in indices]), slots_P, reduce)


def _criterion(name: str, field: str) -> Criterion:
    return resolve(name, CRITERIA, f"sparsity.rules.{field}")


def _summed(values: dict[str, int], pools: dict[str, str]) -> dict[str, int]:
    sums = dict.fromkeys(pools.values(), 0)
    for name, value in values.items():
        sums[pools[name]] += value
    return sums


def _floored(keys: Keys, n: int, m: int) -> Tensor:
    return with_floor(keys(), n, m)


def _protected(keys: Keys, first: Tensor) -> Tensor:
    return keys().masked_fill(first, KEPT_KEY)


def _only(keys: Keys, allowed: Tensor) -> Tensor:
    return keys().masked_fill(~allowed, -1)
