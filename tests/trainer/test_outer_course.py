"""Where a replica goes on in a log of rounds, on logs of a toy model."""

from dataclasses import replace

import pytest
from gossamer.comm.manifest import LogError
from gossamer.trainer.outer_course import Course
from toy_replicas import CONFIG, TOKENS, open_replica, trained_rows


def course_of(replica) -> Course:
    return Course(replica._exchange, replica._anchors, replica._exchange._store)


def take_round(replica, tokens):
    replica.round(trained_rows(replica, tokens), tokens, TOKENS, 1)


@pytest.fixture
def log(tmp_path):
    """Rounds 0 to 4 of a and b; of 1 and 3 a alone, so that b's message of 3 is late."""
    config = replace(CONFIG, quorum=1, grace_s=0.0, deadline_s=1.0, expected_for_rounds=1)
    a, b = (open_replica(tmp_path, replace(config, replica=name)) for name in "ab")
    for number in range(5):
        b.catch_up(number)
        if number in (0, 2, 4):
            _offer(b, number, TOKENS * number)
        take_round(a, TOKENS * number)
        if number == 3:
            _offer(b, number, TOKENS * number)
    return a, b, tmp_path, config


def _offer(replica, number, tokens):
    """Puts a message and does not wait for the round."""
    settle = replica._exchange.settle
    replica._exchange.settle = lambda number: (_ for _ in ()).throw(InterruptedError)
    with pytest.raises(InterruptedError):
        take_round(replica, tokens)
    replica._exchange.settle = settle


def test_rounds_that_counted_an_earlier_life_are_its_own(log):
    _, b, folder, _ = log
    course = course_of(b)
    assert course.next_round() == 5
    assert [course.next_own(n) for n in range(6)] == [0, 2, 2, 3, 4, 5]  # 3 was counted late, by 4
    assert [course.token(n) for n in (0, 2, 3, 4)] == [0, 2 * TOKENS, 3 * TOKENS, 4 * TOKENS]
    assert course.token(5) == 5 * TOKENS  # by the books


def test_a_checkpoint_will_do_while_the_messages_since_are_there(log):
    a, b, folder, _ = log
    course = course_of(b)
    assert all(course.can_go_on(number) for number in range(6))
    with pytest.raises(LogError, match="stands before round 7, but the log of rounds has 5"):
        course.can_go_on(7)
    next((folder / "rounds/00000001").glob("a-*")).unlink()
    assert not course.can_go_on(1) and course.can_go_on(2)


def test_one_that_was_refused_since_starts_again(log):
    a, b, folder, config = log
    name = f"rounds/00000005/b-e{b._exchange.identity.incarnation:04d}-p0of1.message"
    b._exchange._store.put(name, b"garbage")
    take_round(a, 5 * TOKENS)
    course = course_of(b)
    assert not course.can_go_on(5) and not course.can_go_on(3) and course.can_go_on(6)
    assert course.anchor() == 6
