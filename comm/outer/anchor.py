"""Anchors of a log of rounds: the shared weights and buffers before a round, whole.

The one idea: one anchor and the rounds after it make the weights of today, bit for bit, for whoever
comes new or has lost its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from gossamer.comm.codec.part import Rows
from gossamer.comm.manifest import LogError, PartRef
from gossamer.comm.outer.exchange import Identity
from gossamer.comm.outer.mean import first_of, meet
from gossamer.comm.outer.message import Message, Sent, pack_message, send_dense, unpack_message
from gossamer.comm.outer.record import ANCHOR, Shapes, anchor_name, anchor_part, groups, read_parts
from gossamer.comm.run import WireError
from gossamer.comm.store import Store
from gossamer.comm.wire import frame_digest

if TYPE_CHECKING:
    from gossamer.comm.signing import Verifier

PART_TIMEOUT_S = 600.0
POLL_S = 0.05


class Anchors:
    """Those in `store`, as one rank writes and reads them; `shapes` are those of all its rows."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        shapes: Shapes,
        sign: Callable[[bytes], bytes] | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self._store = store
        self._me = identity
        self._shapes = shapes
        self._sign = sign
        self._verifier = verifier

    def newest(self) -> int | None:
        """The round that the newest anchor comes before."""
        found = [groups(name, ANCHOR) for name in self._store.list("anchor-")]
        return max((int(each[0]) for each in found if each), default=None)

    def put(self, number: int, rows: Iterable[Rows], part_hash: str) -> None:
        """Writes this rank's rows, float32, as they are before round `number`; returns when there
        is an anchor of that round, by this replica or, just the same, by another.

        Every rank of the replica does, and rank 0 makes their parts one. Raises TimeoutError.
        """
        me = self._me
        sent = [send_dense(each.name, each.shape, each.row_start, each.values) for each in rows]
        message = Message(
            **asdict(me), round=number, base_hash=part_hash, inner_steps=0, tokens=0, sent=sent
        )
        names = [
            anchor_part(number, me.replica, me.incarnation, rank, me.num_ranks)
            for rank in range(me.num_ranks)
        ]
        self._store.put(names[me.rank], pack_message(message, self._sign))
        waited_for = list(names) if me.rank == 0 else [anchor_name(number)]
        deadline_s = time.monotonic() + PART_TIMEOUT_S
        while waited_for and self._store.size(anchor_name(number)) is None:
            waited_for = [name for name in waited_for if self._store.size(name) is None]
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{waited_for[0]} did not come within {PART_TIMEOUT_S:g} s")
            time.sleep(POLL_S if waited_for else 0)
        if not waited_for and me.rank == 0:
            refs = [self._ref(name) for name in names]
            text = json.dumps({"parts": [asdict(ref) for ref in refs]}, indent=1)
            self._store.put(anchor_name(number), text.encode())

    def read(self, number: int) -> dict[str, list[Sent]]:
        """What the anchor before round `number` holds, by tensor. Raises LogError."""
        pieces: dict[str, list[Sent]] = {}
        for message in self._messages(number):
            for sent in message.sent:
                pieces.setdefault(sent.run.name, []).append(sent)
        return pieces

    def _messages(self, number: int) -> list[Message]:
        name = anchor_name(number)
        try:
            parts = read_parts(json.loads(self._store.get(name))["parts"])
            frames = [self._store.get(part.name) for part in parts]
        except FileNotFoundError as error:
            raise LogError(f"anchor of round {number}: {error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise LogError(f"{name} is not an anchor: {error}") from error
        messages = []
        for part, frame in zip(parts, frames, strict=True):
            try:
                message = unpack_message(frame, self._shapes, self._verifier)
            except WireError as error:
                raise LogError(f"{part.name} is {error}") from error
            if frame_digest(frame) != part.hash or message.round != number:
                raise LogError(f"{part.name} is not what {name} names")
            messages.append(message)
        return messages

    def _ref(self, name: str) -> PartRef:
        frame = self._store.get(name)
        return PartRef(name, len(frame), frame_digest(frame))


def fill(rows: Rows, pieces: list[Sent]) -> None:
    """Writes what an anchor holds of these rows into them. Raises LogError where some are not."""
    elements, filled = rows.values.view(-1).numpy(), 0
    for sent in pieces:
        if (met := meet(sent, first_of(rows), len(elements))) is not None:
            elements[met[0]] = met[1]
            filled += len(met[1])
    if filled != len(elements):
        raise LogError(f"the anchor lacks rows of {rows.name}")
