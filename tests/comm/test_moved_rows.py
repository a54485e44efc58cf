"""Rows that move from one part to another: the log goes on with an anchor, then with deltas."""

import threading

import pytest
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import read_state
from toy_weights import CONFIG, moved, rows_of, same_bits, toy_state


def publish(publishers: list[Publisher], states: list, step: int) -> None:
    """Part i of 2 publishes its rows of states[i], each in a thread."""
    threads = [
        threading.Thread(target=publisher.publish, args=(list(rows), step))
        for publisher, rows in zip(publishers, states, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)


def test_parts_that_start_over_may_hold_other_rows(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    epoch, state = log.claim_epoch(), toy_state()
    publishers = [Publisher(log, part, 2, epoch, CONFIG) for part in range(2)]
    for step in range(5):
        if step == 2:  # each has what the other had
            for publisher in publishers:
                publisher.start_over()
        dealt = [list(rows_of(state, part, 2)) for part in range(2)]
        publish(publishers, dealt if step < 2 else dealt[::-1], step)
        state = moved(state, 0.1, step)
    state = toy_state()
    for step in range(5):
        manifest = log.manifest(step)
        assert same_bits(read_state(log, step), state)
        assert (bool(manifest.delta), manifest.writer_epoch) == (step not in (0, 2), epoch)
        state = moved(state, 0.1, step)


def test_without_starting_over_other_rows_are_refused(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    publisher = Publisher(log, config=CONFIG)
    publisher.publish(rows_of(toy_state()), 0)
    with pytest.raises(ValueError, match="were published before, not now"):
        publisher.publish(rows_of(toy_state(), 0, 2), 1)
