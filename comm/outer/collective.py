"""Exchange by all-gather over a process group: fixed membership.

The one idea: all replicas get the same bytes, so each comes to the same verdict on its own. There
is no quorum: one that dies takes the group with it, when the group's timeout says so.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from gossamer.comm.manifest import LogError
from gossamer.comm.outer.exchange import Identity, Settled
from gossamer.comm.outer.message import Message, pack_message, unpack_message
from gossamer.comm.outer.record import Shapes
from gossamer.comm.outer.verdict import Offer, fault_of, judge
from gossamer.comm.run import WireError


class CollectiveExchange:
    """`group` (gloo) holds the same rank of every replica, which exchange their rows alone.

    `number`: the first round, where they all go on from checkpoints.
    """

    def __init__(
        self, group: dist.ProcessGroup, identity: Identity, shapes: Shapes, number: int = 0
    ) -> None:
        self.identity = identity
        self.sent = self.read = 0
        """Bytes."""
        self._group = group
        self._shapes = shapes
        self._number = number
        self._books: dict[str, int] = {}
        self._frame = b""

    def next_round(self) -> int:
        return self._number

    def send(self, message: Message) -> None:
        self._frame = pack_message(message)

    def settle(self, number: int) -> Settled:
        if number != self._number:
            raise LogError(f"round {number} cannot be settled: {self._number} is next")
        frames = enumerate(self._gather(self._frame))
        offers = [self._read(member, frame, number) for member, frame in frames]
        names = [offer.replica for offer in offers]
        if len(set(names)) < len(names):
            raise LogError(f"every replica needs a name of its own; found {', '.join(names)}")
        verdict = judge(offers, [], self._books, None, min(names))
        self._number, self._books = number + 1, verdict.books
        messages = {offer.replica: offer.messages for offer in offers}
        return Settled(
            round=number,
            messages=[messages[each.replica] for each in verdict.counted],
            counted=frozenset((each.replica, number) for each in verdict.counted),
            refused=verdict.refused,
            written_by=min(names),
        )

    def _gather(self, frame: bytes) -> list[bytes]:
        """Every member's frame; two collectives, the first for their lengths."""
        num_members = self._group.size()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(num_members)]
        self._group.allgather([lengths], [torch.tensor([len(frame)])]).wait()
        longest = int(max(lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(frame)] = torch.from_numpy(np.frombuffer(frame, np.uint8).copy())
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(num_members)]
        self._group.allgather([found], [padded]).wait()
        # every member passes on all frames but its own
        self.sent += longest * (num_members - 1)
        self.read += longest * (num_members - 1)
        return [each[: int(n)].numpy().tobytes() for each, n in zip(found, lengths, strict=True)]

    def _read(self, member: int, frame: bytes, number: int) -> Offer:
        try:
            message = unpack_message(frame, self._shapes)
        except WireError as error:
            return Offer(f"member {member}", 0, number, fault=str(error))
        me = self.identity
        fault = fault_of(message, me.run_id, number, me.rank, me.num_ranks)
        return Offer(message.replica, message.incarnation, number, [message], fault=fault)
