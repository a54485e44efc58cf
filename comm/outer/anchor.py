"""What is whole in a log of rounds: anchors, and the error buffers of those who left.

The one idea: an anchor, weights and shared buffers before some round, and the rounds after it make
the weights of today, bit for bit, for whoever comes new or has lost its own. Parts of all ranks are
put first; the file that lists them makes them one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict
from threading import Thread

from gossamer.comm.codec.part import Rows
from gossamer.comm.manifest import LogError, PartRef
from gossamer.comm.outer.claim import gone
from gossamer.comm.outer.exchange import Identity
from gossamer.comm.outer.mean import first_of, meet
from gossamer.comm.outer.message import Message, Sent, pack_message, send_dense, unpack_message
from gossamer.comm.outer.record import ANCHOR, Shapes, anchor_name, groups, left_name, read_parts
from gossamer.comm.outer.retention import sweep
from gossamer.comm.outer.seal import NO_SEAL, Seal
from gossamer.comm.run import WireError
from gossamer.comm.store import Store
from gossamer.comm.wire import frame_digest

LOG = logging.getLogger(__name__)

NO_HASH = "0" * 16
PART_TIMEOUT_S = 600.0
POLL_S = 0.05


class Anchors:
    """Those in `store`, as one rank writes and reads them; `shapes` are those of all its rows."""

    def __init__(
        self,
        store: Store,
        identity: Identity,
        shapes: Shapes,
        seal: Seal = NO_SEAL,
    ) -> None:
        self._store = store
        self._me = identity
        self._shapes = shapes
        self._seal = seal
        self._seen: set[str] = set()

    def newest(self) -> int | None:
        """The round that the newest anchor comes before."""
        found = [groups(name, ANCHOR) for name in self._store.list("anchor-")]
        return max((int(each[0]) for each in found if each), default=None)

    def put(self, number: int, rows: Iterable[Rows], part_hash: str) -> None:
        """Writes this rank's rows, float32, as they are before round `number`; returns when there
        is an anchor of that round, by this replica or, just the same, by another.

        Every rank of the replica does, and rank 0 makes their parts one. Raises TimeoutError.
        """
        names = self._parts(f"anchors/{number:08d}/", "anchor")
        self._put(anchor_name(number), names, self._message(number, rows, part_hash))

    def sweep(self, keep_anchors: int) -> None:
        """Deletes old rounds beside what comes next; what it cannot is the next pass's (rank 0)."""
        if self._me.rank == 0 and keep_anchors:
            Thread(target=_sweep, args=(self._store, keep_anchors), daemon=True).start()

    def read(self, number: int) -> dict[str, list[Sent]]:
        """What the anchor before round `number` holds, by tensor. Raises LogError."""
        return self._read(anchor_name(number))

    def leave(self, number: int, errors: Iterable[Rows]) -> None:
        """Says that this replica sends no more, so that nobody waits for it, and leaves its error
        buffers to whoever inherits them. Every rank does. Raises TimeoutError."""
        names = self._parts("left/", "error")
        message = self._message(number, errors, NO_HASH)
        self._put(left_name(self._me.replica, self._me.incarnation), names, message)

    def inherit(self) -> dict[str, list[Sent]]:
        """What replicas left that nobody else has taken on, by tensor; each once for this rank."""
        pieces: dict[str, list[Sent]] = {}
        for replica, incarnation in gone(self._store).items():
            left = left_name(replica, incarnation)
            if left in self._seen:
                continue
            self._seen.add(left)
            heir = left.removesuffix(".json") + ".heir"
            mine = f"{self._me.replica} {self._me.incarnation}".encode()
            if self._store.put(heir, mine) or self._store.get(heir) == mine:
                for name, sent in self._read(left).items():
                    pieces.setdefault(name, []).extend(sent)
        return pieces

    def _parts(self, folder: str, kind: str) -> list[str]:
        """The files of all ranks of this replica."""
        me = self._me
        stem = f"{folder}{me.replica}-e{me.incarnation:04d}"
        return [f"{stem}-p{rank}of{me.num_ranks}.{kind}" for rank in range(me.num_ranks)]

    def _message(self, number: int, rows: Iterable[Rows], part_hash: str) -> Message:
        sent = [send_dense(each.name, each.shape, each.row_start, each.values) for each in rows]
        return Message(
            **asdict(self._me),
            round=number,
            base_hash=part_hash,
            inner_steps=0,
            tokens=0,
            sent=sent,
        )

    def _put(self, whole: str, names: list[str], message: Message) -> None:
        """Writes this rank's part; the file `whole` exists when this returns."""
        self._store.put(names[self._me.rank], pack_message(message, self._seal.sign))
        deadline_s = time.monotonic() + PART_TIMEOUT_S
        while self._store.size(whole) is None:
            missing = [name for name in names if self._store.size(name) is None]
            if self._me.rank == 0 and not missing:
                frames = [self._store.get(name) for name in names]
                parts = [
                    asdict(PartRef(name, len(frame), frame_digest(frame)))
                    for name, frame in zip(names, frames, strict=True)
                ]
                self._store.put(whole, self._seal.pack({"parts": parts}, whole))
            elif time.monotonic() > deadline_s:
                raise TimeoutError(f"{whole} did not come within {PART_TIMEOUT_S:g} s")
            else:
                time.sleep(POLL_S)

    def _read(self, whole: str) -> dict[str, list[Sent]]:
        try:
            parts = read_parts(self._seal.unpack(self._store.get(whole), whole)["parts"])
            frames = [self._store.get(part.name) for part in parts]
        except FileNotFoundError as error:
            raise LogError(f"{whole} cannot be read: {error}") from error
        except LogError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise LogError(f"{whole} does not list its parts: {error}") from error
        pieces: dict[str, list[Sent]] = {}
        for part, frame in zip(parts, frames, strict=True):
            try:
                message = unpack_message(frame, self._shapes, self._seal.verifier)
            except WireError as error:
                raise LogError(f"{part.name} is {error}") from error
            if frame_digest(frame) != part.hash or message.run_id != self._me.run_id:
                raise LogError(f"{part.name} is not what {whole} names")
            for sent in message.sent:
                pieces.setdefault(sent.run.name, []).append(sent)
        return pieces


def _sweep(store: Store, keep_anchors: int) -> None:
    try:
        sweep(store, keep_anchors)
    except OSError:
        LOG.warning("old rounds were not deleted", exc_info=True)


def fill(rows: Rows, pieces: list[Sent]) -> None:
    """Writes what an anchor holds of these rows into them. Raises LogError where some are not."""
    elements, filled = rows.values.view(-1).numpy(), 0
    for sent in pieces:
        if (met := meet(sent, first_of(rows), len(elements))) is not None:
            elements[met[0]] = met[1]
            filled += len(met[1])
    if filled != len(elements):
        raise LogError(f"the anchor lacks rows of {rows.name}")
