"""Where a replica goes on in a log of rounds: what its first rank reads off the records.

The one idea: a replica that resumes trains again the rounds that counted its earlier life, from the
same tokens, and finds them settled: so it comes to the state it had, error buffers and all, and no
token counts twice. Rounds that did not count it are applied as they are.
"""

from __future__ import annotations

from gossamer.comm.manifest import LogError
from gossamer.comm.outer.anchor import Anchors
from gossamer.comm.outer.record import Counted
from gossamer.comm.outer.round_log import LogExchange
from gossamer.comm.store import Store


class Course:
    """The log, as rank 0 reads it before a replica starts and after each of its rounds."""

    def __init__(self, log: LogExchange, anchors: Anchors, store: Store) -> None:
        self._log, self._anchors, self._store = log, anchors, store

    def anchor(self) -> int:
        """The round of the newest anchor; -1 where there is none."""
        newest = self._anchors.newest()
        return -1 if newest is None else newest

    def next_round(self) -> int:
        """The first that is not settled."""
        return self._log.next_round()

    def can_go_on(self, number: int) -> bool:
        """Whether a checkpoint from before round `number` leads to the state of today: this replica
        was not refused since, and the messages of that round are there still.

        Raises LogError where the log does not reach the checkpoint.
        """
        stop, me = self.next_round(), self._log.identity.replica
        if stop < number:
            raise LogError(
                f"the checkpoint stands before round {number}, but the log of rounds has {stop};"
                " expected the log of the run"
            )
        if any(me in self._log.record(n).refused for n in range(number, stop)):
            return False
        counted = self._log.record(number).counted if stop > number else []
        parts = [part.name for each in counted for part in each.parts]
        return all(self._store.size(name) is not None for name in parts)

    def next_own(self, number: int) -> int:
        """The first round from `number` on that the replica takes part in: one that counted its
        earlier life, or the one that is not settled."""
        stop = self.next_round()
        return next((n for n in range(number, stop) if self._own(n, stop)), stop)

    def token(self, number: int) -> int:
        """The token of its stream that round `number` begins with, at the least."""
        own = self._own(number, self.next_round())
        me = self._log.identity.replica
        return own.tokens_before if own else self._log.books().get(me, 0)

    def _own(self, number: int, stop: int) -> Counted | None:
        """This replica's message of round `number`, counted there or as a late one."""
        me = self._log.identity.replica
        for settled_in in range(number, min(number + 2, stop)):
            for each in self._log.record(settled_in).counted:
                if (each.replica, each.round) == (me, number):
                    return each
        return None
