"""Masks that replicas share: changed at the end of a round, the same on all, by what all know.

The one idea: a mask is part of the shared weights. Its bits are rows beside them, so they are in
the hash that every round's record commits to and in every anchor; and each replica works out the
next ones from the settled round alone (shared weights, and of the messages that counted the mean of
the dense gradients and the sum of the tokens), also for rounds that it was not there for. What is
not on the mask is cleared after every round, in weights, momentum and error buffers; and what is
sent is chosen among elements on the mask, and coded among them (kept.py).

Masks under which weights live on (STE) are no affair of the rounds: dense weights are shared, and
each replica takes its masks from those. DECISIONS 15.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.exchange import Exchange
from gossamer.comm.outer.replica import MASK_PREFIX, WINDOW_PREFIX, WINDOW_TOKENS, Replica
from gossamer.parallel.masks import MASK, WINDOW
from gossamer.trainer.sparsity.bits import pack_rows, row_bytes, unpack_rows
from gossamer.trainer.sparsity.kept import COLUMN, Columns, KeptExchange, KeptRule
from gossamer.trainer.sparsity.method import Band, Point
from gossamer.trainer.sparsity.run import SparseRun
from torch import Tensor


class SharedMasks:
    """Of one rank of a replica; every rank makes the same calls."""

    def __init__(self, sparse: SparseRun, inner_steps: int, total_steps: int) -> None:
        self._sparse, self._inner_steps, self._total_steps = sparse, inner_steps, total_steps
        method, start = sparse.method, Point(0)
        self.names = frozenset(n for n in sparse.names if not method.flow(n, start).keeps_dense)
        """Matrices whose masks the rounds decide."""
        last_steps = range(inner_steps - 1, total_steps, inner_steps)
        self._scored = frozenset(n for s in last_steps for n in method.step(Point(s)).scores)
        self._scored_experts = sorted(self._scored & sparse.experts.keys())
        sparse.shared = self.names
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._columns = Columns({name: sparse.shapes[name] for name in self.names}, self._mask)
        self._changed: frozenset[str] = frozenset()

    # --- for OuterSync --------------------------------------------------------------------------

    def rows(self) -> Iterator[Rows]:
        """What goes beside the weights of this rank: masks, and the windows that are due."""
        due = self._sparse.due
        for rows in self._sparse.engine.owned(with_moments=True):
            if rows.name not in self.names:
                continue
            packed = pack_rows(rows.moments[MASK]).float()
            shape = (rows.shape[0], row_bytes(rows.shape))
            yield Rows(MASK_PREFIX + rows.name, shape, rows.row_start, packed)
            if rows.name in self._scored:
                window = rows.moments.get(WINDOW) if rows.name in due else None
                values = torch.zeros_like(rows.master) if window is None else window
                yield Rows(WINDOW_PREFIX + rows.name, rows.shape, rows.row_start, values)
        if dist.get_rank() == 0 and self._scored_experts:
            seen = [self._sparse.window_tokens(n) if n in due else 0 for n in self._scored_experts]
            counts = torch.tensor(seen, dtype=torch.float32)
            yield Rows(WINDOW_TOKENS, (len(seen),), 0, counts)

    def through(self, exchange: Exchange, shapes: dict[str, tuple[int, ...]]) -> Exchange:
        """`exchange`, on which masked weights travel without what is masked; `shapes` are those it
        was made with, to which the shapes of columns are added."""
        self._shapes = shapes
        return KeptExchange(exchange, self._columns)

    def attach(self, replica: Replica, is_new: bool) -> None:
        """`replica` has its rows now; they are new: not what this rank's engine holds."""
        self._replica = replica
        replica.on_applied = self._applied
        replica.rule = KeptRule(replica.rule, self._columns)
        self._changed = self.names if is_new else frozenset()
        before = range(replica.number, 0, -1)
        self._changed_in = next((number for number in before if self._due(number)), 0)
        self._lay_columns()

    def install(self, step: int) -> None:
        """What the rounds made of the masks comes into force; the run is at `step` now."""
        names, self._changed = self._changed, frozenset()
        version = self._point(self._changed_in).step
        self._sparse.install(step, names, self._mask, version)

    # --- a round is settled ---------------------------------------------------------------------

    def _due(self, number: int) -> frozenset[str]:
        return self._sparse.method.step(self._point(number)).updates & self.names

    def _point(self, number: int) -> Point:
        return Point(min(number * self._inner_steps, self._total_steps))

    def _applied(self, number: int) -> None:
        """New masks from the weights after `number` rounds, and what is off them is cleared."""
        due = self._due(number)
        if due:
            bands = self._bands(due)
            point = self._point(number)
            masks = self._sparse.method.update(bands, point, dist.all_reduce, due)
            for band, mask in zip(bands, masks, strict=True):
                key = MASK_PREFIX + band.name, band.row_start
                self._replica.rows[key].values.copy_(pack_rows(mask))
            self._changed |= due
            self._changed_in = number
        rule, weights = self._replica.rule, self._replica.rows
        held = {key: rows.values for key, rows in weights.items()}
        for (buffer, row_start), values in chain(
            *(b.items() for b in (held, rule.shared, rule.own))
        ):
            name = buffer.rpartition(" ")[2]  # a rule's own may be called `momentum of NAME`
            if buffer.startswith(WINDOW_PREFIX):
                values.zero_()
            elif name in self.names and not buffer.startswith(MASK_PREFIX):
                values.masked_fill_(~self._mask(name, row_start), 0.0)
        if due:
            self._lay_columns()

    def _mask(self, name: str, row_start: int) -> Tensor:
        """bool [rows, columns] of rows that this rank owns."""
        packed = self._replica.rows[MASK_PREFIX + name, row_start].values
        return unpack_rows(packed.to(torch.uint8), self._sparse.shapes[name])

    def _bands(self, names: frozenset[str]) -> list[Band]:
        tokens = torch.zeros(len(self._scored_experts))
        if (WINDOW_TOKENS, 0) in self._replica.rows:
            tokens.copy_(self._replica.rows[WINDOW_TOKENS, 0].values)
        dist.broadcast(tokens, src=0)
        seen = dict(zip(self._scored_experts, tokens.tolist(), strict=True))
        bands = []
        for (name, row_start), rows in self._replica.rows.items():
            if name in names:
                window = self._replica.rows.get((WINDOW_PREFIX + name, row_start))
                bands.append(
                    Band(
                        name=name,
                        shape=tuple(rows.shape),
                        row_start=row_start,
                        weight_RC=rows.values,
                        mask_RC=self._mask(name, row_start),
                        gradient_RC=None if window is None else window.values,
                        tokens=round(seen[name]) if name in seen else None,
                    )
                )
        return bands

    def _lay_columns(self) -> None:
        """Which shapes messages of the coming round may have; those of older masks no more."""
        for name in [name for name in self._shapes if COLUMN.fullmatch(name)]:
            del self._shapes[name]
        owned = [key for key in self._replica.rows if key[0] in self.names]
        self._shapes |= self._columns.lay(owned, self._changed_in)
