"""What the trainer asked for: order, back-pressure, what fails, what is forgotten. No Ray."""

import threading
import time

import pytest
from gossamer.comm.rollout import Request, Sample, VersionSpan
from gossamer.launch.rollout_queue import RolloutQueue
from hypothesis import given
from hypothesis import strategies as st


def requests(*numbers: int) -> list[Request]:
    return [
        Request(request_id=f"r{n}", prompt_ids=(n,), max_new_tokens=1, temperature=1.0, key=(n,))
        for n in numbers
    ]


def answer(unit, version=0) -> list[Sample]:
    spans = (VersionSpan(start=0, stop=1, version=version),)
    told = {"token_ids": (1,), "logprobs": (0.0,), "spans": spans, "finished": True}
    return [Sample(request_id=r.request_id, **told) for r in unit.requests]


def first(queue) -> str | None:
    unit = queue.next()
    return unit and unit.requests[0].request_id


def test_what_the_trainer_waits_for_comes_first():
    queue = RolloutQueue(max_waiting_samples=1, prompt_retries=0)
    queue.submit("ahead", [requests(1), requests(2), requests(4)], 0)
    queue.submit("refill", [requests(3)], 0)
    ready = queue.next()
    assert ready.requests == requests(1)
    queue._batches["refill"].is_wanted = True
    assert first(queue) == "r3" and not queue.is_held()
    queue.take(ready, answer(ready))
    assert queue.is_held() and first(queue) is None  # one sample waits already
    queue._batches["ahead"].is_wanted = True
    assert not queue.is_held() and [first(queue), first(queue), first(queue)] == ["r2", "r4", None]


def test_a_unit_goes_to_who_may_have_it():
    queue = RolloutQueue(None, 0)
    queue.submit("new", [requests(1)], 7)
    queue.submit("old", [requests(2)], 3)
    assert queue.next(lambda unit: unit.oldest_version <= 4).requests == requests(2)
    assert queue.next(lambda unit: unit.oldest_version <= 4) is None
    unit = queue.next()
    assert unit.is_met_by(answer(unit, 7)) and not unit.is_met_by(answer(unit, 6))


def test_the_least_version_is_that_of_what_the_trainer_waits_for():
    queue = RolloutQueue(None, 0)
    assert queue.least_version() is None
    queue.submit("new", [requests(1)], 7)
    queue.submit("old", [requests(2)], 3)
    assert queue.least_version() == 3
    queue._batches["new"].is_wanted = True
    assert queue.least_version() == 7


def test_what_an_earlier_attempt_asked_for_is_forgotten():
    queue, said = RolloutQueue(None, 0), []
    queue.submit("0", [requests(1), requests(2)], 0)
    in_flight = queue.next()

    def wait() -> None:
        with pytest.raises(RuntimeError, match="batch 0 was asked for by an attempt that is over"):
            queue.collect("0")
        said.append(True)

    waiting = threading.Thread(target=wait)
    waiting.start()
    deadline_s = time.monotonic() + 60
    while not queue._batches["0"].is_wanted:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    queue.begin_attempt(2)
    waiting.join(60)
    assert said
    queue.submit("0", [requests(1)], 3, attempt=2)
    # a call that was on its way when the link was cut
    for late in (lambda: queue.submit("0", [requests(1)], 0, 1), lambda: queue.collect("0", 1)):
        with pytest.raises(RuntimeError, match="attempt 1 is over; attempt 2 goes on"):
            late()
    queue.take(in_flight, answer(in_flight))
    queue.try_again(in_flight)
    queue.put_back(in_flight)
    assert len(queue) == 1 and queue.next().oldest_version == 3


@given(
    st.lists(st.lists(st.integers(10, 20), min_size=1, max_size=4), min_size=1, max_size=5),
    st.data(),
)
def test_whatever_fails_every_prompt_is_answered_or_given_up_once(prompts, data):
    numbers = iter(range(1000))
    units = [
        [
            Request(request_id=f"{next(numbers)}", prompt_ids=(p,), max_new_tokens=1,
                    temperature=1.0, key=(0,))
            for p in unit for _ in range(2)
        ]
        for unit in prompts
    ]  # fmt: skip
    poison, retries = data.draw(st.sets(st.integers(10, 20))), data.draw(st.integers(1, 3))
    queue, lost, runs = RolloutQueue(None, retries), [], 0
    queue.submit("batch", units, 0)
    while (unit := queue.next()) is not None:
        runs += 1
        if poison.intersection(r.prompt_ids[0] for r in unit.requests):
            if (request := queue.try_again(unit)) is not None:
                lost.append(request)
        elif data.draw(st.booleans()):
            queue.put_back(unit)
            unit = queue.next()
            queue.take(unit, answer(unit))
        else:
            queue.take(unit, answer(unit))
    asked = [request for unit in units for request in unit]
    sound = [r.request_id for r in asked if r.prompt_ids[0] not in poison]
    assert [sample.request_id for sample in queue.collect("batch")] == sound
    assert len(lost) <= len(asked) - len(sound) and runs <= len(asked) * (retries + 2)
