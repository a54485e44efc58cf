"""How the messages of a round come to all replicas.

The one idea: an exchange answers one question, whose messages make up round n, with the same answer
for everyone and for good. Everything else a replica works out from that answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gossamer.comm.outer.message import Message

EXCHANGES = {
    "collective": "gossamer.comm.outer.collective:CollectiveExchange",
    "log": "gossamer.comm.outer.round_log:LogExchange",
}


class QuorumError(TimeoutError):
    """Too few replicas sent a sound message before the deadline."""


class RefusedError(RuntimeError):
    """The others do not count this replica's message: it must start again from the last anchor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Who sends: goes into every message."""

    run_id: str
    replica: str
    rank: int = 0
    num_ranks: int = 1
    incarnation: int = 1
    """Counts the starts of a replica of that name; the newest is the replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """Whose messages make up a round."""

    round: int
    messages: list[list[Message]]
    """Of each replica that counts the parts at hand, in the order in which they are added up."""
    counted: frozenset[tuple[str, int]]
    """(replica, round the message was made in)."""
    refused: dict[str, str]
    """Why a replica's message of this round does not count."""
    written_by: str
    """The replica that settled the round."""


class Exchange(Protocol):
    """One rank's way to the other replicas."""

    identity: Identity

    def next_round(self) -> int:
        """The first round that is not settled."""
        ...

    def send(self, message: Message) -> None:
        """Offers this rank's message for its round."""
        ...

    def settle(self, number: int) -> Settled:
        """Waits until round `number` is settled; at once where it was settled long ago.

        Raises QuorumError, LogError.
        """
        ...
