"""How masked matrices travel: what is kept of one is a column of its own.

The one idea: the kept elements of a matrix, in order, are a tensor of shape [K, 1], and rows of the
matrix are rows of that column. A rule chooses among them and a message tells of them as of any
tensor's rows; neither knows of masks. Columns are laid out here alone, on both ends, and what a
rule holds of a matrix lies where the matrix has it: checkpoints, anchors and changes of masks are
as without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.exchange import Exchange, Identity, Settled
from gossamer.comm.outer.mean import meet
from gossamer.comm.outer.message import Message, Sent
from gossamer.comm.outer.rule import Buffers, Key, OuterRule, flat
from gossamer.comm.run import BLOCK_ROWS, Run
from gossamer.parallel.gather import gather_texts
from torch import Tensor, from_numpy, zeros_like

COLUMN = re.compile(r"kept since round (\d+) of (.+)")


class Columns:
    """Those of all masked matrices, as one rank of a replica knows them: how long, and which rows
    begin where; which elements they hold, of the rows that are its own."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], mask: Callable[[str, int], Tensor]
    ) -> None:
        """`shapes` of whole matrices; mask(name, row_start): bool, of rows that this rank owns."""
        self.since = 0
        """The round before which masks changed last."""
        self._shapes, self._mask = shapes, mask
        self._owned: dict[str, list[int]] = {}
        self._starts: dict[str, np.ndarray] = {}
        self._places: dict[Key, np.ndarray] = {}

    def lay(self, owned: Iterable[Key], since: int) -> dict[str, tuple[int, int]]:
        """Lays them out by the masks of now; their shapes, by name. A collective call.

        `owned`: this rank's rows, which begin with a band of 64.
        """
        self.since, self._owned, self._places, mine = since, {}, {}, []
        for name, row_start in owned:
            self._owned.setdefault(name, []).append(row_start)
            bands = self._mask(name, row_start).split(BLOCK_ROWS)
            mine.append((name, row_start, [int(band.sum()) for band in bands]))
        counts = {
            n: np.zeros(-(-s[0] // BLOCK_ROWS) + 1, np.int64) for n, s in self._shapes.items()
        }
        for text in gather_texts(json.dumps(mine)):
            for name, row_start, found in json.loads(text):
                first = row_start // BLOCK_ROWS + 1
                counts[name][first : first + len(found)] = found
        self._starts = {name: each.cumsum() for name, each in counts.items()}
        lengths = {name: int(starts[-1]) for name, starts in self._starts.items()}
        return {column_name(since, name): (length, 1) for name, length in lengths.items() if length}

    def of(self, rows: Rows) -> tuple[Rows, np.ndarray] | None:
        """(Rows of a column, the flat places in `rows` that they hold); None: nothing is kept."""
        places, start = self._kept(rows.name, rows.row_start)
        if len(places) == 0:
            return None
        name, length = column_name(self.since, rows.name), int(self._starts[rows.name][-1])
        values = from_numpy(flat(rows.values)[places]).view(-1, 1)
        return Rows(name, (length, 1), start, values), places

    def whole(self, sent: Sent) -> Sent | None:
        """What is `sent` of a column, as of its matrix: the elements that this rank owns, under the
        sender's rows and norm, so that all ranks judge it alike. None: the matrix is others'."""
        found = COLUMN.fullmatch(sent.run.name)
        if found is None:
            return sent
        name = found[2]
        if name not in self._owned:
            return None
        starts, shape = self._starts[name], self._shapes[name]
        stop = sent.run.row_start + sent.run.num_rows
        first = int(np.searchsorted(starts, sent.run.row_start, "right") - 1) * BLOCK_ROWS
        end = min(int(np.searchsorted(starts, stop)) * BLOCK_ROWS, shape[0])
        run = Run(name, "float32", shape, first, end - first)
        places, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for row_start in self._owned[name]:
            mine, begin = self._kept(name, row_start)
            if (met := meet(sent, begin, len(mine))) is not None:
                shift = (row_start - first) * run.row_elements
                places.append(mine[met[0]].astype(np.int64) + shift)
                values.append(met[1])
        positions = np.concatenate(places).astype(np.uint32)
        return Sent(run, max(sent.k, 1), positions, np.concatenate(values), sent.norm)

    def has(self, name: str) -> bool:
        """Whether that matrix has a column."""
        return name in self._starts

    def _kept(self, name: str, row_start: int) -> tuple[np.ndarray, int]:
        """Flat places of what is kept in the rows that begin there, uint32, and where they begin in
        the column."""
        key = name, row_start
        if key not in self._places:
            mask = self._mask(name, row_start)
            self._places[key] = np.flatnonzero(mask.numpy()).astype(np.uint32)
        return self._places[key], int(self._starts[name][row_start // BLOCK_ROWS])


def column_name(since: int, name: str) -> str:
    """Of a matrix's column under the masks since a round: those of other masks have other names."""
    return f"kept since round {since} of {name}"


@dataclass(frozen=True, slots=True)
class KeptSent(Sent):
    """What is sent of rows of a masked matrix, all of them the sender's."""

    coded: Sent
    """The same of the column: as it goes over the wire."""


class KeptRule:
    """An outer rule that chooses what to send of masked matrices among what is kept."""

    def __init__(self, rule: OuterRule, columns: Columns) -> None:
        self.on_gradients, self.shared, self.own = rule.on_gradients, rule.shared, rule.own
        self.step, self.take_back, self.absent = rule.step, rule.take_back, rule.absent
        self._rule, self._columns = rule, columns
        self._number, self._prefixes = -1, frozenset[str]()

    def send(self, delta: Rows, number: int) -> Sent | None:
        """See OuterRule. While it chooses, the rule holds its buffers of these rows as a column."""
        if not self._columns.has(delta.name):
            return self._rule.send(delta, number)
        found = self._columns.of(delta)
        if found is None:
            return None
        if number != self._number:  # a rule's own may be called `momentum of NAME`
            names = [name for name, _ in (*self.own, *self.shared)]
            self._prefixes = frozenset(n.removesuffix(n.rpartition(" ")[2]) for n in names)
            self._number = number
        (column, places), rule = found, self._rule
        rule.own, rule.shared = (self._lent(b, delta, *found) for b in (self.own, self.shared))
        coded, own = rule.send(column, number), rule.own
        rule.own, rule.shared = self.own, self.shared
        for (buffer, _), values in own.items():
            key = buffer.removesuffix(column.name) + delta.name, delta.row_start
            if key not in self.own:
                self.own[key] = zeros_like(delta.values)
            flat(self.own[key])[places] = flat(values)
        if coded is None:
            return None
        run = Run(delta.name, "float32", delta.shape, delta.row_start, len(delta.values))
        if coded.positions is not None:
            return KeptSent(run, coded.k, places[coded.positions], coded.values, coded.norm, coded)
        everything = np.zeros(run.num_elements, np.float32)
        everything[places] = coded.values
        return KeptSent(run, 0, None, everything, coded.norm, coded)

    def _lent(self, buffers: Buffers, rows: Rows, column: Rows, places: np.ndarray) -> Buffers:
        """The buffers of these rows, as rows of the column."""
        lent: Buffers = {}
        for prefix in self._prefixes:
            if (values := buffers.get((prefix + rows.name, rows.row_start))) is not None:
                key = prefix + column.name, column.row_start
                lent[key] = from_numpy(flat(values)[places]).view(-1, 1)
        return lent


class KeptExchange:
    """An exchange whose messages hold columns in place of masked matrices."""

    def __init__(self, exchange: Exchange, columns: Columns) -> None:
        self.identity: Identity = exchange.identity
        self.next_round = exchange.next_round
        self._exchange, self._columns = exchange, columns

    def send(self, message: Message) -> None:
        """See Exchange."""
        sent = [each.coded if isinstance(each, KeptSent) else each for each in message.sent]
        self._exchange.send(replace(message, mask_version=self._columns.since, sent=sent))

    def settle(self, number: int) -> Settled:
        """See Exchange."""
        settled = self._exchange.settle(number)
        messages = [[self._whole(part) for part in each] for each in settled.messages]
        return replace(settled, messages=messages)

    def _whole(self, part: Message) -> Message:
        sent = map(self._columns.whole, part.sent)
        return replace(part, sent=[each for each in sent if each is not None])
