"""One change of the masks of a rule's matrices.

The one idea: it is at most two acts, prune to the target density and trade weights at that density;
every method is some choice of scores and budgets for them. Masks of blocks have one element a block
until the end.

SET: Mocanu et al., 2018 (arXiv 1707.04780). RigL: Evci et al., 2020 (arXiv 1911.11134). GraNet: Liu
et al., 2021 (arXiv 2106.10404).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from gossamer.parallel.engine import BAND_ROWS
from gossamer.trainer.sparsity.config import DistributionConfig, PatternConfig, RegrowConfig
from gossamer.trainer.sparsity.criteria import Criterion
from gossamer.trainer.sparsity.distributions import POOLED, counts, densities, pool_of
from gossamer.trainer.sparsity.method import Band, Reduce, Shapes
from gossamer.trainer.sparsity.patterns import (
    KEPT_KEY,
    best_of_groups,
    block,
    block_scores,
    spread,
    with_floor,
)
from gossamer.trainer.sparsity.selection import Piece, score_keys, select
from torch import Tensor

Keys = Callable[[], Tensor]
"""int32 keys of a band's elements or blocks; -1 is no candidate."""


class Change:
    """What is the same in all acts; a collective object: every rank makes the same calls."""

    def __init__(
        self,
        *,
        bands: Sequence[Band],
        shapes: Shapes,
        pattern: PatternConfig,
        distribution: DistributionConfig,
        density: float,
        lives: bool,
        draw: str,
        reduce: Reduce,
    ) -> None:
        """shapes: of all the rule's matrices, sorted by name; lives: masked weights do; draw: names
        the occasion, for what is random."""
        self._bands, self._shapes, self._pattern = bands, shapes, pattern
        self._distribution, self._density, self._lives = distribution, density, lives
        self._draw, self._reduce = draw, reduce
        self._blocks = {name: block(pattern, shape[1]) for name, shape in shapes.items()}
        self._sizes = {
            n: math.prod(shape) // math.prod(self._blocks[n]) for n, shape in shapes.items()
        }
        self._own = {name: name for name in shapes}

    def dense(self) -> list[Tensor]:
        """Nothing is masked."""
        return [torch.ones_like(band.mask_RC) for band in self._bands]

    def groups(self, score: Criterion, n: int, m: int) -> list[Tensor]:
        """The best n of every m columns; of those that are kept, where the others do not live."""
        masks = self.dense() if self._lives else [band.mask_RC for band in self._bands]
        return [best_of_groups(keys(), n, m) for keys in self._keys(score, masks, "keep")]

    def prune(self, score: Criterion) -> list[Tensor]:
        """Masks of the target density: the best of the kept, or of all where all live."""
        blocks = [self._blocks[band.name] for band in self._bands]
        masks = [b.mask_RC[::h, ::w] for b, (h, w) in zip(self._bands, blocks, strict=True)]
        if self._density == 1.0:
            return [torch.ones_like(mask) for mask in masks]
        kept = self._sizes if self._lives else self._count(masks, 0)[0]
        kind = self._distribution.kind
        pools = {name: pool_of(kind, name) for name in self._shapes}
        shares = dict.fromkeys(pools.values(), self._density)
        if kind not in POOLED:
            shares = densities(self._distribution, self._shapes, self._density)
        most = _summed(kept, pools)
        keep = counts(shares, _summed(self._sizes, pools), most)
        if not self._lives and keep == most:
            return masks
        if self._lives:
            masks = [torch.ones_like(mask) for mask in masks]
        keys = self._keys(score, masks, "keep")
        if self._pattern.kind == "n_m_floor":
            keys = [partial(_floored, key, self._pattern.n, self._pattern.m) for key in keys]
        if kind in POOLED:
            keys = self._bounded(keys, kept, pools, keep)
        return self._select(keys, pools, keep)

    def trade(
        self,
        masks: Sequence[Tensor],
        keep_score: Criterion,
        grow_score: Criterion,
        share: float,
        regrow: RegrowConfig,
    ) -> list[Tensor]:
        """Drops the worst `share` of every matrix's kept weights and grows as many elsewhere; what
        was just dropped may come back."""
        kept, is_cold = self._count(masks, regrow.min_tokens)
        whole = math.floor if regrow.rounding == "down" else math.ceil
        drop = {n: 0 if is_cold[n] else min(k, whole(share * k)) for n, k in kept.items()}
        keep = {name: kept[name] - drop[name] for name in kept}
        stay = self._select(self._keys(keep_score, masks, "trade"), self._own, keep)
        grow = self._keys(grow_score, [~mask for mask in stay], "grow")
        new = self._select(grow, self._own, drop)
        return [s | n for s, n in zip(stay, new, strict=True)]

    def elements(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """Masks of blocks as masks of elements."""
        bands = zip(self._bands, masks, strict=True)
        return [spread(mask, *self._blocks[band.name]) for band, mask in bands]

    def _bounded(
        self,
        keys: list[Keys],
        kept: Mapping[str, int],
        pools: Mapping[str, str],
        keep: Mapping[str, int],
    ) -> list[Keys]:
        """Keys by which no pool takes less than floor of a matrix, or more than ceiling."""
        floor, ceiling = self._distribution.floor, self._distribution.ceiling
        density = self._density
        if floor > 0.0:
            least = {
                n: min(kept[n], math.ceil(floor * size), math.floor(density * size))
                for n, size in self._sizes.items()
            }
            first = self._select(keys, self._own, least)
            keys = [partial(_protected, k, f) for k, f in zip(keys, first, strict=True)]
        if ceiling < 1.0:
            most = {
                n: min(kept[n], max(math.floor(ceiling * size), math.ceil(density * size)))
                for n, size in self._sizes.items()
            }
            short = {pool: keep[pool] - n for pool, n in _summed(most, pools).items()}
            for name, pool in pools.items():  # rounding may leave a pool too little
                more = max(0, min(short[pool], kept[name] - most[name]))
                most[name], short[pool] = most[name] + more, short[pool] - more
            allowed = self._select(keys, self._own, most)
            keys = [partial(_only, k, a) for k, a in zip(keys, allowed, strict=True)]
        return keys

    def _keys(self, score: Criterion, candidates: Sequence[Tensor], act: str) -> list[Keys]:
        draw = f"{self._draw} {act}"
        return [
            partial(_band_keys, score, band, mask, self._blocks[band.name], draw)
            for band, mask in zip(self._bands, candidates, strict=True)
        ]

    def _count(
        self, masks: Sequence[Tensor], min_tokens: int
    ) -> tuple[dict[str, int], dict[str, bool]]:
        """(kept units, has an expert with fewer tokens) of each matrix, over all ranks."""
        index = {name: i for i, name in enumerate(self._shapes)}
        found = torch.zeros(2, len(index), dtype=torch.int64)
        for band, mask in zip(self._bands, masks, strict=True):
            found[0, index[band.name]] += int(mask.sum())
            if band.tokens is not None and band.tokens < min_tokens:
                found[1, index[band.name]] = 1
        self._reduce(found)
        kept, cold = found.tolist()
        return dict(zip(index, kept, strict=True)), dict(zip(index, map(bool, cold), strict=True))

    def _select(
        self, keys: Sequence[Keys], pools: Mapping[str, str], keep: Mapping[str, int]
    ) -> list[Tensor]:
        """The keep[pool] greatest keys of each pool; see select()."""
        indices = {pool: i for i, pool in enumerate(sorted(keep))}
        slots, slots_P, num_slots = {}, [0] * len(indices), 0
        for name in sorted(pools, key=lambda name: (pools[name], name)):
            height = -(-self._shapes[name][0] // BAND_ROWS)
            slots[name], num_slots = num_slots, num_slots + height
            slots_P[indices[pools[name]]] += height
        pieces = [
            Piece(indices[pools[b.name]], slots[b.name] + b.row_start // BAND_ROWS, key)
            for b, key in zip(self._bands, keys, strict=True)
        ]
        keep_P = torch.tensor([keep[pool] for pool in indices])
        return select(pieces, keep_P, torch.tensor(slots_P), self._reduce)


def _summed(values: Mapping[str, int], pools: Mapping[str, str]) -> dict[str, int]:
    sums = dict.fromkeys(pools.values(), 0)
    for name, value in values.items():
        sums[pools[name]] += value
    return sums


def _band_keys(
    score: Criterion, band: Band, candidates: Tensor, size: tuple[int, int], draw: str
) -> Tensor:
    keys = score_keys(block_scores(score(band, draw), *size), band.name)
    return keys.masked_fill(~candidates, -1)


def _floored(keys: Keys, n: int, m: int) -> Tensor:
    return with_floor(keys(), n, m)


def _protected(keys: Keys, first: Tensor) -> Tensor:
    return keys().masked_fill(first, KEPT_KEY)


def _only(keys: Keys, allowed: Tensor) -> Tensor:
    return keys().masked_fill(~allowed, -1)
