"""Exchange through a store: replicas come and go, and there is no server of ours.

The one idea: as in the weight log, what counts is what one file says that can be created only once.
Every replica puts its message, whoever first finds the round complete writes the record, and all
read the same messages back.
"""

from __future__ import annotations

import time

from gossamer.comm.log import StaleWriterError
from gossamer.comm.manifest import LogError, file_hash
from gossamer.comm.outer.claim import gone, newest_claims
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.exchange import Identity, QuorumError, Settled
from gossamer.comm.outer.inbox import Inbox
from gossamer.comm.outer.message import Message, pack_message
from gossamer.comm.outer.record import (
    RECORD,
    Record,
    Shapes,
    groups,
    message_name,
    pack_record,
    record_name,
    unpack_record,
)
from gossamer.comm.outer.seal import NO_SEAL, Seal
from gossamer.comm.outer.verdict import Offer, Verdict, judge
from gossamer.comm.store import Store


class LogExchange:
    """One rank's end of the log of rounds in `store`; `identity` is what `claim.join` returned.

    `shapes` are those of all tensors, by name. What it writes is signed by `seal`; a message that
    the members did not sign is refused, and a record that they did not sign is an error.
    """

    def __init__(
        self,
        store: Store,
        config: OuterConfig,
        identity: Identity,
        shapes: Shapes,
        seal: Seal = NO_SEAL,
    ) -> None:
        self.identity = identity
        self._store = store
        self._config = config
        self._seal = seal
        self._inbox = Inbox(store, identity.run_id, shapes, seal.verifier)
        self._next = 0
        # with the hash of the file
        self._records: dict[int, tuple[Record, str]] = {}

    def next_round(self) -> int:
        if self._next == 0:
            found = [groups(name, RECORD) for name in self._store.list("round-")]
            self._next = max((int(each[0]) + 1 for each in found if each), default=0)
        while self._is_settled(self._next):
            self._next += 1
        return self._next

    def send(self, message: Message) -> None:
        """Raises StaleWriterError where the name was taken over, or two processes use one claim."""
        me = self.identity
        if newest_claims(self._store).get(me.replica, me.incarnation) != me.incarnation:
            raise StaleWriterError(f"replica {me.replica} was taken over by a newer process")
        name = message_name(message.round, me.replica, me.incarnation, me.rank, me.num_ranks)
        frame = pack_message(message, self._seal.sign)
        if not self._store.put(name, frame) and self._store.get(name) != frame:
            raise StaleWriterError(f"{name} exists with other bytes: two processes use one claim")

    def settle(self, number: int) -> Settled:
        started_s = time.monotonic()
        quorum_s: float | None = None
        while not self._is_settled(number):
            waited_s = time.monotonic() - started_s
            is_over = waited_s >= self._config.deadline_s
            if self.identity.rank == 0:
                offers = self._inbox.offers(number)
                verdict = self._judge(number, offers)
                if sum(e.round == number for e in verdict.counted) >= self._config.quorum:
                    quorum_s = waited_s if quorum_s is None else quorum_s
                    # nobody knows yet who lives: the first round has no grace but its deadline
                    is_graced = number > 0 and waited_s - quorum_s >= self._config.grace_s
                    if is_over or is_graced or not self._awaited(number, offers):
                        self._write(number, verdict)
                        continue
            if is_over:
                raise QuorumError(
                    f"round {number} was not settled within {self._config.deadline_s:g} s: "
                    f"fewer than {self._config.quorum} replicas sent a sound message"
                )
            time.sleep(self._config.poll_s)
        return self._settled(self.record(number))

    def record(self, number: int) -> Record:
        """Raises LogError where the round is not settled, or its record damaged."""
        if number not in self._records:
            name = record_name(number)
            try:
                data = self._store.get(name)
            except FileNotFoundError as error:
                raise LogError(f"round {number} is not settled: {error}") from error
            record = unpack_record(data, name, self._seal)
            if (record.run_id, record.round) != (self.identity.run_id, number):
                raise LogError(f"{name} is of run {record.run_id}, round {record.round}")
            last = self._records.get(number - 1)
            if last is not None and last[1] != record.parent_hash:
                raise LogError(f"{name} does not go on {record_name(number - 1)} as it is")
            self._records[number] = record, file_hash(data)
            self._records.pop(number - self._config.expected_for_rounds - 1, None)
        return self._records[number][0]

    def books(self) -> dict[str, int]:
        """Up to which token each replica's stream was counted: where one that returns goes on."""
        last = self.next_round() - 1
        return dict(self.record(last).books) if last >= 0 else {}

    # --- whose messages count -------------------------------------------------------------------

    def _is_settled(self, number: int) -> bool:
        return number in self._records or self._store.size(record_name(number)) is not None

    def _judge(self, number: int, offers: list[Offer]) -> Verdict:
        """The verdict on what is there by now."""
        me = self.identity.replica
        if number == 0:
            return judge(offers, [], {}, None, me)
        last = self.record(number - 1)
        known = {each.replica for each in last.counted if each.round == last.round}
        known.update(last.refused)
        late = self._inbox.offers(number - 1) if self._config.late == "next" else []
        late = [offer for offer in late if offer.replica not in known]
        return judge(offers, late, last.books, last.base_hash, me)

    def _awaited(self, number: int, offers: list[Offer]) -> bool:
        """True while someone is waited for."""
        if number == 0:
            return len(offers) < self._config.expected_replicas
        left = gone(self._store)
        first = max(0, number - self._config.expected_for_rounds)
        lately = [each for n in range(first, number) for each in self.record(n).counted]
        expected = {e.replica for e in lately if left.get(e.replica, 0) < e.incarnation}
        return not expected <= {offer.replica for offer in offers}

    def _write(self, number: int, verdict: Verdict) -> None:
        """Settles the round, unless another did meanwhile."""
        parent = None
        if number:
            self.record(number - 1)
            parent = self._records[number - 1][1]
        record = Record(
            run_id=self.identity.run_id,
            round=number,
            parent_hash=parent,
            base_hash=verdict.base_hash,
            mask_version=verdict.mask_version,
            counted=verdict.counted,
            refused=verdict.refused,
            books=verdict.books,
            written_by=self.identity.replica,
            created_s=time.time(),
        )
        self._store.put(record_name(number), pack_record(record, self._seal))

    def _settled(self, record: Record) -> Settled:
        messages = [[self._inbox.counted(ref) for ref in each.parts] for each in record.counted]
        self._inbox.forget(record.round)
        return Settled(
            round=record.round,
            messages=messages,
            counted=frozenset((each.replica, each.round) for each in record.counted),
            refused=record.refused,
            written_by=record.written_by,
        )
