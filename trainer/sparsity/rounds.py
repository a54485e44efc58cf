"""Masks that replicas share: changed at the end of a round, the same on all, by what all know.

The one idea: a mask is part of the shared weights. Its bits are rows beside them, so they are in
the hash that every round's record commits to and in every anchor; and each replica works out the
next ones from the settled round alone (shared weights, mean of the dense gradients that the
messages brought), also for rounds that it was not there for. What is not on the mask is cleared
after every round, in weights, momentum and error buffers; and of what is sent whole only elements
on the mask are sent, in their order, without positions.

Masks under which weights live on (STE) are no affair of the rounds: dense weights are shared, and
each replica takes its masks from those. DECISIONS 15.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.exchange import Exchange, Identity, Settled
from gossamer.comm.outer.message import Message, Sent, norm_of, send_dense
from gossamer.comm.outer.replica import MASK_PREFIX, WINDOW_PREFIX, Replica
from gossamer.comm.run import BLOCK_ROWS, Run
from gossamer.parallel.gather import gather_texts
from gossamer.parallel.masks import MASK, WINDOW
from gossamer.trainer.sparsity.bits import pack_rows, row_bytes, unpack_rows
from gossamer.trainer.sparsity.method import Band, Point
from gossamer.trainer.sparsity.run import SparseRun
from torch import Tensor

TOKENS = WINDOW_PREFIX + "tokens"
KEPT = re.compile(r"kept since round (\d+) of (.+) from row (\d+)")


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
            yield Rows(TOKENS, (len(seen),), 0, torch.tensor(seen, dtype=torch.float32))

    def through(self, exchange: Exchange, shapes: dict[str, tuple[int, ...]]) -> Exchange:
        """`exchange`, on which masked weights travel without what is masked; `shapes` are those it
        was made with, to which the shapes of what is kept are added."""
        self._shapes = shapes
        return _KeptExchange(exchange, self)

    def attach(self, replica: Replica, is_new: bool) -> None:
        """`replica` has its rows now; they are new: not what this rank's engine holds."""
        self._replica = replica
        replica.on_applied = self._applied
        self._changed = self.names if is_new else frozenset()
        self._tell_kept()

    def install(self, step: int) -> None:
        """What the rounds made of the masks comes into force; the run is at `step` now."""
        names, self._changed = self._changed, frozenset()
        version = self._point(self.changed_in).step
        self._sparse.install(step, names, self._mask, version)

    def kept_places(self, name: str, row_start: int) -> np.ndarray | None:
        """Flat places on the mask of the 64 rows from `row_start`; None where others own them."""
        for first, stop in self._owned.get(name, ()):
            if first <= row_start < stop:
                packed = self._replica.rows[MASK_PREFIX + name, first].values
                band = packed[row_start - first :][:BLOCK_ROWS].to(torch.uint8)
                mask = unpack_rows(band, self._sparse.shapes[name])
                return np.flatnonzero(mask.numpy()).astype(np.uint32)
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole matrix."""
        return self._sparse.shapes[name]

    @property
    def changed_in(self) -> int:
        """The round before which masks changed last: a function of the round and the plan."""
        for number in range(self._replica.number, 0, -1):
            if self._due(number):
                return number
        return 0

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
            masks = self._sparse.method.update(bands, self._point(number), dist.all_reduce)
            for band, mask in zip(bands, masks, strict=True):
                key = MASK_PREFIX + band.name, band.row_start
                self._replica.rows[key].values.copy_(pack_rows(mask))
            self._changed |= due
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
            self._tell_kept()

    def _mask(self, name: str, row_start: int) -> Tensor:
        """bool [rows, columns] of rows that this rank owns."""
        packed = self._replica.rows[MASK_PREFIX + name, row_start].values
        return unpack_rows(packed.to(torch.uint8), self._sparse.shapes[name])

    def _bands(self, names: frozenset[str]) -> list[Band]:
        tokens = torch.zeros(len(self._scored_experts))
        if (TOKENS, 0) in self._replica.rows:
            tokens.copy_(self._replica.rows[TOKENS, 0].values)
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
                        tokens=int(seen[name]) if name in seen else None,
                    )
                )
        return bands

    def _tell_kept(self) -> None:
        """Which shapes messages of the coming round may have; those of older masks no more."""
        self._owned: dict[str, list[tuple[int, int]]] = {}
        mine, since = [], self.changed_in
        for (name, row_start), rows in self._replica.rows.items():
            if name not in self.names:
                continue
            self._owned.setdefault(name, []).append((row_start, row_start + len(rows.values)))
            for first in range(row_start, row_start + len(rows.values), BLOCK_ROWS):
                places = self.kept_places(name, first)
                if places is not None and len(places):
                    mine.append(f"{kept_name(since, name, first)}\t{len(places)}")
        for name in [name for name in self._shapes if KEPT.fullmatch(name)]:
            del self._shapes[name]
        for line in "\n".join(gather_texts("\n".join(mine))).split("\n"):
            name, mark, count = line.partition("\t")
            if mark:
                self._shapes[name] = (int(count),)


class _KeptExchange:
    """An exchange whose messages hold of masked matrices that are sent whole what is kept."""

    def __init__(self, exchange: Exchange, masks: SharedMasks) -> None:
        self._exchange, self._masks = exchange, masks
        self.identity: Identity = exchange.identity
        self.next_round = exchange.next_round

    def send(self, message: Message) -> None:
        """See Exchange."""
        since = self._masks.changed_in
        sent = [part for each in message.sent for part in self._kept(each, since)]
        self._exchange.send(replace(message, mask_version=since, sent=sent))

    def settle(self, number: int) -> Settled:
        """See Exchange."""
        settled = self._exchange.settle(number)
        messages = [
            [replace(part, sent=[s for each in part.sent for s in self._whole(each)]) for part in m]
            for m in settled.messages
        ]
        return replace(settled, messages=messages)

    def _kept(self, sent: Sent, since: int) -> Iterator[Sent]:
        run = sent.run
        if run.name not in self._masks.names or sent.positions is not None:
            yield sent
            return
        for first in range(run.row_start, run.row_start + run.num_rows, BLOCK_ROWS):
            start = (first - run.row_start) * run.row_elements
            places = self._masks.kept_places(run.name, first)
            assert places is not None, "what is sent is this rank's"
            if len(places):
                values = torch.from_numpy(sent.values[start + places.astype(np.int64)])
                name = kept_name(since, run.name, first)
                yield send_dense(name, (len(values),), 0, values)

    def _whole(self, sent: Sent) -> Iterator[Sent]:
        """Of other ranks' rows, whose places are not known here, nothing."""
        found = KEPT.fullmatch(sent.run.name)
        if found is None:
            yield sent
            return
        name, first = found[2], int(found[3])
        places = self._masks.kept_places(name, first)
        if places is not None:
            shape = self._masks.shape(name)
            num_rows = min(BLOCK_ROWS, shape[0] - first)
            run = Run(name, "float32", shape, first, num_rows)
            yield Sent(run, 1, places, sent.values, norm_of(sent.values))


def kept_name(since: int, name: str, first: int) -> str:
    """Of the kept elements of the 64 rows from `first`, under the masks since a round."""
    return f"kept since round {since} of {name} from row {first}"
