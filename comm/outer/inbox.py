"""The messages of a round as they lie in the store, read once.

The one idea: whatever is wrong with a message becomes a sentence that the record can hold; nothing
that a replica puts there stops another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossamer.comm.manifest import LogError, PartRef
from gossamer.comm.outer.claim import newest_claims
from gossamer.comm.outer.message import Message, unpack_message
from gossamer.comm.outer.record import MESSAGE, Shapes, groups
from gossamer.comm.outer.verdict import Offer, fault_of
from gossamer.comm.run import WireError
from gossamer.comm.store import Store
from gossamer.comm.wire import frame_digest

if TYPE_CHECKING:
    from gossamer.comm.signing import Verifier


class Inbox:
    """Messages by file name; `shapes` are those of all tensors, by name."""

    def __init__(
        self, store: Store, run_id: str, shapes: Shapes, verifier: Verifier | None
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._shapes = shapes
        self._verifier = verifier
        self._read: dict[str, tuple[Message | str, PartRef]] = {}

    def offers(self, number: int) -> list[Offer]:
        """The replicas of which all parts are there, each by its newest incarnation."""
        claims = newest_claims(self._store)
        parts: dict[tuple[str, int, int], dict[int, str]] = {}
        for name in self._store.list(f"rounds/{number:08d}/"):
            found = groups(name, MESSAGE)
            if found and claims.get(found[1]) == int(found[2]):
                who = found[1], int(found[2]), int(found[4])
                parts.setdefault(who, {})[int(found[3])] = name
        return [
            self._offer(replica, incarnation, number, [names[rank] for rank in sorted(names)])
            for (replica, incarnation, num_ranks), names in sorted(parts.items())
            if sorted(names) == list(range(num_ranks))
        ]

    def counted(self, ref: PartRef) -> Message:
        """A message that a record counts. Raises LogError where it is not what was counted."""
        message, found = self._message(ref.name)
        if isinstance(message, str) or found != ref:
            self._read.pop(ref.name)
            told = message if isinstance(message, str) else f"digest {found.hash[:8]}"
            raise LogError(f"{ref.name} is not what the record counts, {ref.hash[:8]}: {told}")
        return message

    def forget(self, number: int) -> None:
        """Drops what was read of rounds before `number`."""
        self._read = {name: each for name, each in self._read.items() if _round_of(name) >= number}

    def _offer(self, replica: str, incarnation: int, number: int, names: list[str]) -> Offer:
        messages, refs = [], []
        for rank, name in enumerate(names):
            message, ref = self._message(name)
            if isinstance(message, str):
                return Offer(replica, incarnation, number, fault=message)
            fault = fault_of(message, self._run_id, number, rank, len(names))
            if (message.replica, message.incarnation) != (replica, incarnation):
                fault = f"its message is by {message.replica}, {message.incarnation}"
            if fault:
                return Offer(replica, incarnation, number, fault=fault)
            messages.append(message)
            refs.append(ref)
        return Offer(replica, incarnation, number, messages, refs)

    def _message(self, name: str) -> tuple[Message | str, PartRef]:
        """The message, or what is wrong with it."""
        if name not in self._read:
            try:
                data = self._store.get(name)
            except FileNotFoundError as error:
                raise LogError(f"a message of a settled round: {error}") from error
            message: Message | str
            try:
                message = unpack_message(data, self._shapes, self._verifier)
            except (WireError, LogError) as error:
                message = str(error)
            self._read[name] = message, PartRef(name, len(data), frame_digest(data))
        return self._read[name]


def _round_of(name: str) -> int:
    found = groups(name, MESSAGE)
    return int(found[0]) if found else -1
