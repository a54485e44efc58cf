"""What becomes of a part of a run when something happens to it: one table, and one failure policy.

The one idea: whatever a run looks after (its trainer, an engine, one replica of several) lives by
the same table and is given up by the same rule. Both are pure: whoever looks after a part tells
what it saw and does what it is told.

    WAITING --start--> STARTING --ready--> RUNNING --done--> FINISHED
       ^                  ^ |                | |
       |                  | |                | unfit
       |                  | +---leave--+     v
       |                  +---idle--- | - DRAINING
       +--died (from the last three)  v      |
       |                          LEAVING <--+ leave --idle or died--> STOPPED
       +--given up--> LOST
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from gossamer.launch.config import RecoveryConfig


class State(StrEnum):
    """Of a part."""

    WAITING = "waiting"
    """For a place to run, or for the pause after a failure."""
    STARTING = "starting"
    """Being made; an engine: until it has caught up with the log."""
    RUNNING = "running"
    DRAINING = "draining"
    """Gets no new work, for it is unfit; is started anew once it has done what it has."""
    LEAVING = "leaving"
    """Gets no new work, for it is not wanted any more."""
    FINISHED = "finished"
    STOPPED = "stopped"
    LOST = "lost"
    """Given up."""

    @property
    def is_over(self) -> bool:
        """Nothing happens to it any more."""
        return self in (State.FINISHED, State.STOPPED, State.LOST)


class Event(StrEnum):
    """What can happen to a part."""

    START = "start"
    READY = "ready"
    UNFIT = "unfit"
    """Too far behind, or not what it should be."""
    IDLE = "idle"
    """It has done what it had to do."""
    LEAVE = "leave"
    DIED = "died"
    GIVEN_UP = "given up"
    DONE = "done"


TRANSITIONS = {
    (State.WAITING, Event.START): State.STARTING,
    (State.WAITING, Event.GIVEN_UP): State.LOST,
    (State.WAITING, Event.LEAVE): State.STOPPED,
    (State.STARTING, Event.READY): State.RUNNING,
    (State.STARTING, Event.DONE): State.FINISHED,  # there was nothing left to do
    (State.STARTING, Event.DIED): State.WAITING,
    (State.STARTING, Event.LEAVE): State.LEAVING,
    (State.RUNNING, Event.DONE): State.FINISHED,
    (State.RUNNING, Event.UNFIT): State.DRAINING,
    (State.RUNNING, Event.DIED): State.WAITING,
    (State.RUNNING, Event.LEAVE): State.LEAVING,
    (State.DRAINING, Event.IDLE): State.STARTING,
    (State.DRAINING, Event.DIED): State.WAITING,
    (State.DRAINING, Event.LEAVE): State.LEAVING,
    (State.LEAVING, Event.IDLE): State.STOPPED,
    (State.LEAVING, Event.DIED): State.STOPPED,
    (State.LEAVING, Event.DONE): State.FINISHED,
}
"""All that can happen."""


def after(state: State, event: Event) -> State:
    """The state that follows. Raises ValueError for what the table does not have."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        known = ", ".join(str(each) for at, each in TRANSITIONS if at == state) or "nothing"
        raise ValueError(f"{event} happened to what is {state}; expected {known}") from None


@dataclass(frozen=True, slots=True)
class Failure:
    """A part died."""

    reason: str
    """One sentence."""
    progress: int = 0
    """What it had achieved in all by then: steps that are saved, units that were answered."""
    is_final: bool = False
    """It would fail so again."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about the last failure."""

    restart_after_s: float | None
    """None: give up."""
    why: str


def decide(failures: Sequence[Failure], recovery: RecoveryConfig) -> Decision:
    """What to do about the last of a part's failures, given all that it had, oldest first.

    A part is started again as long as it gets on: only failures in a row count between which
    nothing was achieved, and the more of them, the longer is the pause.
    """
    last = failures[-1]
    if last.is_final:
        return Decision(None, last.reason)
    in_a_row = 1
    while in_a_row < len(failures):
        later, earlier = failures[-in_a_row], failures[-in_a_row - 1]
        if later.progress > earlier.progress:
            break
        in_a_row += 1
    if in_a_row > recovery.max_failures:
        most = f"recovery.max_failures={recovery.max_failures}"
        return Decision(None, f"{last.reason}, failure {in_a_row} without progress, of {most}")
    doublings = min(in_a_row - 1, 30)  # a float holds no more of thousands
    pause_s = min(recovery.max_pause_s, recovery.pause_s * 2**doublings)
    return Decision(pause_s, f"{last.reason}; started again in {pause_s:g} s")
