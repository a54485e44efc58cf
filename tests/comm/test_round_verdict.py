"""Whose messages count and in which order; and records, messages and claims that do not fit."""

import time
from dataclasses import replace
from threading import Thread

import pytest
import torch
from gossamer.comm.manifest import LogError
from gossamer.comm.outer.exchange import QuorumError
from gossamer.comm.outer.message import Message
from gossamer.comm.outer.verdict import Offer, judge
from gossamer.comm.store import open_store
from toy_replicas import CONFIG, TOKENS, open_replica, run_round, state_of, trained_rows


def offer(replica, number, tokens_before, base=7, tokens=10, masks=0):
    message = Message(
        run_id="toy",
        round=number,
        replica=replica,
        base_hash=f"{base:016x}",
        inner_steps=1,
        tokens_before=tokens_before,
        tokens=tokens,
        mask_version=masks,
        sent=[],
    )
    return Offer(replica, 1, number, [message])


def who(verdict):
    return [(each.replica, each.round) for each in verdict.counted]


def test_messages_are_added_by_replica_and_then_by_round():
    offers = [offer("c", 4, 0), offer("a", 4, 20), offer("b", 4, 0)]
    verdict = judge(offers, [offer("a", 3, 10, base=6)], {"a": 10}, f"{6:016x}", "b")
    assert who(verdict) == [("a", 3), ("a", 4), ("b", 4), ("c", 4)]
    assert verdict.books == {"a": 30, "b": 10, "c": 10} and verdict.refused == {}


def test_a_late_message_on_other_weights_does_not_count():
    verdict = judge([offer("b", 4, 0)], [offer("a", 3, 10, base=5)], {}, f"{6:016x}", "b")
    assert who(verdict) == [("b", 4)]


@pytest.mark.parametrize(("masks", "counts"), [(4, False), (2, True)])
def test_a_late_message_under_older_masks_does_not_count(masks, counts):
    late = offer("a", 3, 10, base=6, masks=2)
    verdict = judge([offer("b", 4, 0, masks=masks)], [late], {}, f"{6:016x}", "b")
    assert (("a", 3) in who(verdict), verdict.mask_version) == (counts, masks)


def test_most_weights_win_and_of_as_many_the_writer():
    three = [offer("a", 0, 0, base=1), offer("b", 0, 0, base=2), offer("c", 0, 0, base=2)]
    assert who(judge(three, [], {}, None, "a")) == [("b", 0), ("c", 0)]
    assert who(judge(three[:2], [], {}, None, "a")) == [("a", 0)]
    assert who(judge(three[:2], [], {}, None, "b")) == [("b", 0)]


def test_what_is_in_the_books_or_broken_is_refused_with_its_reason():
    verdict = judge(
        [offer("a", 1, 9), offer("b", 1, 10), Offer("c", 1, 1, fault="garbage")],
        [],
        {"a": 10, "b": 10},
        None,
        "a",
    )
    assert who(verdict) == [("b", 1)]
    assert verdict.refused["c"] == "garbage"
    assert verdict.refused["a"] == "its tokens begin at 9, the books hold them up to 10"


def test_replicas_divides_by_the_messages_of_the_round(tmp_path):
    """Two of averaging, of which one alone changed an expert: half of its change."""
    name = "model.norm.weight"
    config = replace(CONFIG, rule="averaging", aggregation="replicas", expected_replicas=2)
    a, b = (open_replica(tmp_path, replace(config, replica=each)) for each in "ab")
    before = state_of(a)[name]
    changed = [each for each in trained_rows(a, 0) if each.name == name]
    wanted = before - (before - changed[0].values) / 2
    other = Thread(target=lambda: b.round([], 0, TOKENS, 1))
    other.start()
    a.round(changed, 0, TOKENS, 1)
    other.join()
    assert torch.allclose(state_of(a)[name], wanted, atol=1e-6)
    assert a.part_hash() == b.part_hash()


def test_a_message_of_an_older_incarnation_does_not_count(tmp_path):
    """It was put, and then the name was taken over before the round was settled."""
    old = open_replica(tmp_path, replace(CONFIG, replica="a", quorum=2, deadline_s=0.1))
    with pytest.raises(QuorumError):
        run_round(old, 0)
    new = open_replica(tmp_path, replace(CONFIG, replica="a", quorum=2), takeover=True)
    assert [each.incarnation for each in new._exchange._inbox.offers(0)] == []


def test_the_same_message_may_be_put_again(tmp_path):
    """A call that failed behind the put is made again."""
    a = open_replica(tmp_path, replace(CONFIG, replica="a", quorum=2, deadline_s=0.1))
    sent = []
    send = a._exchange.send
    a._exchange.send = lambda message: (sent.append(message), send(message))
    with pytest.raises(QuorumError):
        run_round(a, 0)
    send(sent[0])


def test_a_message_that_changed_behind_its_record_is_found(tmp_path):
    a, b = (open_replica(tmp_path, replace(CONFIG, replica=each)) for each in "ab")
    run_round(a, 0)
    store = open_store(tmp_path)
    name = a._exchange.record(0).counted[0].parts[0].name
    store.put(name, other_message(tmp_path / "elsewhere"), overwrite=True)
    with pytest.raises(LogError, match="is not what the record counts"):
        b.catch_up()


def other_message(folder):
    """A sound message of that name and round, with other values."""
    twin = open_replica(folder, replace(CONFIG, replica="a"))
    twin.round(trained_rows(twin, 0, rate=0.7), 0, TOKENS, 1)
    return open_store(folder).get(twin._exchange.record(0).counted[0].parts[0].name)


def test_a_record_that_changed_behind_the_next_one_is_found(tmp_path):
    a, b = (open_replica(tmp_path, replace(CONFIG, replica=each)) for each in "ab")
    run_round(a, 0)
    run_round(a, TOKENS)
    store = open_store(tmp_path)
    text = store.get("round-00000000.json")
    store.put("round-00000000.json", text.replace(b'"a": 100', b'"a": 101'), overwrite=True)
    with pytest.raises(LogError, match="round-00000001.json does not go on round-00000000.json"):
        b.catch_up()


def test_nobody_waits_for_one_that_left(tmp_path):
    a, b = (open_replica(tmp_path, replace(CONFIG, replica=n, grace_s=30.0)) for n in "ab")
    run_round(a, 0)
    b.catch_up()
    started_s = time.monotonic()
    a.leave()
    b.round(trained_rows(b, 0), 0, TOKENS, 1)
    assert time.monotonic() - started_s < 10
