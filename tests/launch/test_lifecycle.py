"""The table of what can happen to a part of a run, and when it is given up."""

import pytest
from gossamer.launch.config import RecoveryConfig
from gossamer.launch.lifecycle import TRANSITIONS, Event, Failure, State, after, decide
from hypothesis import given
from hypothesis import strategies as st


def reachable(start: State) -> set[State]:
    found, left = {start}, [start]
    while left:
        at = left.pop()
        new = {to for (state, _), to in TRANSITIONS.items() if state == at} - found
        found |= new
        left += new
    return found


def test_every_state_is_reached_and_every_part_can_end():
    assert reachable(State.WAITING) == set(State)
    for state in State:
        ends = {each for each in reachable(state) if each.is_over}
        assert ends
        # what is over stays so, and nothing else is stuck
        assert state.is_over == (reachable(state) == {state})


def test_whatever_lives_may_die_or_be_asked_to_leave():
    for state in (State.STARTING, State.RUNNING, State.DRAINING):
        assert after(state, Event.DIED) == State.WAITING
        assert after(state, Event.LEAVE) == State.LEAVING
    assert after(State.LEAVING, Event.DIED) == State.STOPPED  # it was to go anyway


def test_only_what_runs_is_given_work():
    """READY alone leads to RUNNING: nothing goes back to work without having caught up."""
    assert [pair for pair, to in TRANSITIONS.items() if to == State.RUNNING] == [
        (State.STARTING, Event.READY)
    ]


def test_what_cannot_happen_is_told():
    with pytest.raises(ValueError, match="start happened to what is running; expected done, unfit"):
        after(State.RUNNING, Event.START)
    with pytest.raises(ValueError, match="died happened to what is lost; expected nothing"):
        after(State.LOST, Event.DIED)


def slow_in_a_row(failures: list[Failure]) -> int:
    """By replaying them."""
    count, most = 0, None
    for failure in failures:
        count = count + 1 if most is not None and failure.progress <= most else 1
        most = failure.progress
    return count


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(0, 6), st.floats(0.125, 64)
)
def test_the_policy_against_a_replay(progress, max_failures, max_pause_s):
    failures = [Failure("it died", each) for each in progress]
    recovery = RecoveryConfig(max_failures=max_failures, pause_s=0.125, max_pause_s=max_pause_s)
    decision, in_a_row = decide(failures, recovery), slow_in_a_row(failures)
    if in_a_row > max_failures:
        assert decision.restart_after_s is None
        assert f"failure {in_a_row} without progress" in decision.why
    else:
        assert decision.restart_after_s == min(max_pause_s, 0.125 * 2 ** (in_a_row - 1))
        assert decision.why.startswith("it died; started again in")


@given(st.lists(st.integers(1, 5), max_size=50))
def test_a_part_that_gets_on_is_never_given_up(steps):
    progress = [sum(steps[: i + 1]) for i in range(len(steps))] or [1]
    failures = [Failure("killed", each) for each in progress]
    assert decide(failures, RecoveryConfig(max_failures=1, pause_s=1)).restart_after_s == 1


def test_a_part_that_does_not_get_on_is_given_up_however_long_its_life():
    failures = [Failure("killed", 7)] * 2000
    recovery = RecoveryConfig(max_failures=5000, pause_s=1, max_pause_s=60)
    assert decide(failures, recovery).restart_after_s == 60
    assert decide(failures[:1], RecoveryConfig(max_failures=0)).restart_after_s is None


def test_what_would_fail_again_is_given_up_at_once():
    decision = decide([Failure("train.x is wrong", 5, is_final=True)], RecoveryConfig())
    assert (decision.restart_after_s, decision.why) == (None, "train.x is wrong")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_failures": -1}, "recovery.max_failures is -1; expected 0 or more"),
        ({"pause_s": -1.0}, "recovery.pause_s is -1.0; expected 0 or more"),
        ({"pause_s": 5.0, "max_pause_s": 1.0}, "recovery.max_pause_s is 1.0; expected at least"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        RecoveryConfig(**settings)
