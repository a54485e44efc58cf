"""Rounds through a store: who counts, who is waited for, and what comes of the others."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.log import StaleWriterError
from gossamer.comm.manifest import LogError
from gossamer.comm.outer import message as message_module
from gossamer.comm.outer.anchor import Anchors
from gossamer.comm.outer.claim import join
from gossamer.comm.outer.exchange import QuorumError, RefusedError
from gossamer.comm.outer.message import Message, pack_message, send_dense
from gossamer.comm.outer.record import message_name
from gossamer.comm.outer.replica import Replica, shapes_of
from gossamer.comm.outer.round_log import LogExchange
from gossamer.comm.store import open_store
from toy_replicas import (
    CONFIG,
    SHAPES,
    TOKENS,
    identity_of,
    initial_rows,
    open_replica,
    run_round,
    state_of,
    trained_rows,
)


def config_of(name, **options):
    return replace(CONFIG, replica=name, **options)


def together(*calls):
    """Runs the calls at once, in threads; their results or errors."""
    found = [None] * len(calls)

    def run(index, call):
        try:
            found[index] = call()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def round_of(replicas, number):
    """All of them take part in round `number`; a round is TOKENS tokens of each stream."""
    found = together(*(lambda r=r: run_round(r, number * TOKENS) for r in replicas))
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


def same_bits(replicas):
    return len({replica.part_hash() for replica in replicas}) == 1


def test_replicas_hold_the_same_bits_after_every_round(tmp_path):
    replicas = [open_replica(tmp_path, config_of(name, expected_replicas=3)) for name in "abc"]
    start = state_of(replicas[0])
    for number in range(4):
        (settled, *_) = round_of(replicas, number)
        assert settled.counted == {(name, number) for name in "abc"} and not settled.refused
        assert same_bits(replicas)
    assert replicas[0].number == 4
    assert not any(torch.equal(start[name], state_of(replicas[0])[name]) for name in SHAPES)


def test_replicas_that_begin_with_other_weights_get_those_of_the_first(tmp_path):
    a = open_replica(tmp_path, config_of("a"))
    b = open_replica(tmp_path, config_of("b"), rows=initial_rows(seed=7))
    assert same_bits([a, b])


@pytest.mark.parametrize("rule", ["averaging", "diloco", "sparseloco"])
def test_one_that_joins_or_returns_replays_from_the_anchor(tmp_path, rule):
    config = replace(CONFIG, rule=rule, grace_s=0.0)
    a, b = (open_replica(tmp_path, replace(config, replica=name)) for name in "ab")
    for number in range(5):
        round_of([a], number)  # b is absent from the start
        assert b.number <= a.number
    b.catch_up()
    c = open_replica(tmp_path, replace(config, replica="c"))
    assert a.number == b.number == c.number == 5 and same_bits([a, b, c])
    assert a.rule.shared.keys() == c.rule.shared.keys()
    for key, values in a.rule.shared.items():
        assert torch.equal(values, c.rule.shared[key])
    settled = together(*(lambda r=r: run_round(r, 5 * TOKENS) for r in (a, b, c)))
    assert not [each for each in settled if isinstance(each, Exception)]
    for each in (a, b, c):
        each.catch_up()
    assert same_bits([a, b, c])


def test_one_that_is_missing_is_waited_for_and_then_not_any_more(tmp_path):
    options = {"expected_replicas": 2, "grace_s": 0.3, "expected_for_rounds": 1}
    a, b = (open_replica(tmp_path, config_of(name, **options)) for name in "ab")
    round_of([a, b], 0)
    (settled,) = round_of([a], 1)  # b dies; its grace goes by
    assert settled.counted == {("a", 1)}
    b.catch_up()
    assert same_bits([a, b])


def test_a_late_message_counts_in_the_next_round(tmp_path):
    a, b = (open_replica(tmp_path, config_of(n, grace_s=0.0)) for n in "ab")
    round_of([a], 0)
    late = run_round(b, 0)  # its round is settled already
    assert late.counted == {("a", 0)} and 0 in b.pending
    (settled, _) = round_of([a, b], 1)
    assert ("b", 0) in settled.counted and not b.pending.get(0)
    b.catch_up()
    a.catch_up()
    assert same_bits([a, b])


def test_a_late_message_is_dropped_where_that_is_the_policy(tmp_path):
    a, b = (open_replica(tmp_path, config_of(n, grace_s=0.0, late="drop")) for n in "ab")
    round_of([a], 0)
    key = "model.norm.weight", 0
    run_round(b, 0)
    assert not b.pending
    assert b.rule.own[key].abs().sum() > 0  # it came back to the error buffer, whole
    round_of([a], 1)
    assert a._exchange.record(1).counted[0].replica == "a"
    assert len(a._exchange.record(1).counted) == 1


def test_a_quorum_that_never_comes(tmp_path):
    a = open_replica(tmp_path, config_of("a", quorum=2, deadline_s=0.3))
    with pytest.raises(QuorumError, match="round 0 was not settled within 0.3 s"):
        run_round(a, 0)


def test_tokens_are_counted_once(tmp_path):
    a = open_replica(tmp_path, config_of("a"))
    run_round(a, 0)
    b = open_replica(tmp_path, config_of("b"))
    found = together(lambda: run_round(a, 50), lambda: run_round(b, 0))
    assert isinstance(found[0], RefusedError) and "the books hold them up to 100" in str(found[0])
    assert a._exchange.record(1).books == {"a": 100, "b": 100}


def test_one_whose_weights_went_astray_is_refused(tmp_path):
    a, b, c = (open_replica(tmp_path, config_of(n, expected_replicas=3)) for n in "abc")
    b.rows["model.norm.weight", 0].values[3] += 1e-3
    found = together(*(lambda r=r: run_round(r, 0) for r in (a, b, c)))
    assert isinstance(found[1], RefusedError) and "it began the round with" in str(found[1])
    assert found[0].counted == {("a", 0), ("c", 0)} and same_bits([a, c])


def forged(sender, number, **changes):
    """A message by a replica that follows no rule."""
    fields = {
        "run_id": "toy",
        "round": number,
        "replica": sender._exchange.identity.replica,
        "incarnation": sender._exchange.identity.incarnation,
        "base_hash": sender.part_hash(),
        "inner_steps": 1,
        "tokens_before": number * TOKENS,
        "tokens": TOKENS,
        "sent": [],
    }
    return Message(**fields | changes)


def put_forged(folder, replica, number, frame):
    me = replica._exchange.identity
    name = message_name(number, me.replica, me.incarnation, 0, 1)
    assert open_store(folder).put(name, frame)


def nan_frame(replica, number):
    """NaN behind a sound digest: by a sender that does not look."""
    values = torch.ones(24)
    values[5] = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(message_module.np, "isfinite", np.ones_like)
        sent = [send_dense("model.norm.weight", (24,), 0, values)]
        return pack_message(forged(replica, number, sent=[replace(sent[0], norm=1.0)]))


FORGERIES = {
    "garbage": lambda r: b"\x00" * 500,
    "nothing": lambda r: b"",
    "nan": lambda r: nan_frame(r, 1),
    "another run": lambda r: pack_message(forged(r, 1, run_id="other")),
    "another name": lambda r: pack_message(forged(r, 1, replica="a")),
    "another tensor": lambda r: pack_message(
        forged(r, 1, sent=[send_dense("elsewhere", (2,), 0, torch.ones(2))])
    ),
    "another shape": lambda r: pack_message(
        forged(r, 1, sent=[send_dense("model.norm.weight", (2,), 0, torch.ones(2))])
    ),
    "an old round": lambda r: pack_message(forged(r, 0)),
}


@pytest.mark.parametrize("fault", FORGERIES)
def test_a_broken_message_is_refused_and_named_and_the_others_go_on(tmp_path, fault):
    a, b, c = (open_replica(tmp_path, config_of(n, expected_replicas=3)) for n in "abc")
    round_of([a, b, c], 0)
    put_forged(tmp_path, b, 1, FORGERIES[fault](b))
    settled, _ = round_of([a, c], 1)
    assert settled.counted == {("a", 1), ("c", 1)} and settled.refused.keys() == {"b"}
    assert same_bits([a, c])
    b.catch_up()
    assert same_bits([a, b, c])


def test_a_norm_a_thousand_times_too_large_moves_nobody_far(tmp_path):
    a, b, c = (open_replica(tmp_path, config_of(n, expected_replicas=3)) for n in "abc")
    round_of([a, b, c], 0)
    sent = [
        send_dense(each.name, each.shape, 0, 1000 * torch.ones_like(each.values))
        for each in b.rows.values()
    ]
    before = state_of(a)
    put_forged(tmp_path, b, 1, pack_message(forged(b, 1, sent=sent)))
    settled, _ = round_of([a, c], 1)
    assert ("b", 1) in settled.counted and same_bits([a, c])
    for name, values in state_of(a).items():
        parts = [part for each in settled.messages for part in each]
        norms = {p.replica: s.norm for p in parts for s in p.sent if s.run.name == name}
        assert norms["b"] > 50 * norms["a"]
        assert (values - before[name]).norm() <= 6 * max(norms["a"], norms["c"])


def test_a_name_has_one_owner(tmp_path):
    old = open_replica(tmp_path, config_of("a"))
    with pytest.raises(StaleWriterError, match="replica a exists"):
        open_replica(tmp_path, config_of("a"))
    run_round(old, 0)
    new = open_replica(tmp_path, config_of("a"), takeover=True)
    assert same_bits([old, new])
    with pytest.raises(StaleWriterError, match="taken over by a newer process"):
        run_round(old, TOKENS)
    run_round(new, TOKENS)
    assert new._exchange.record(1).books == {"a": 2 * TOKENS}


def test_two_processes_with_one_claim_find_out(tmp_path):
    a = open_replica(tmp_path, config_of("a", quorum=2, deadline_s=0.1))
    with pytest.raises(QuorumError):
        run_round(a, 0)
    with pytest.raises(StaleWriterError, match="two processes use one claim"):
        a.round(trained_rows(a, 40), 40, TOKENS, 1)


def test_replicas_must_agree_on_their_constants(tmp_path):
    open_replica(tmp_path, config_of("a"))
    with pytest.raises(LogError, match="agreed on aggregation 'senders', not 'replicas'"):
        open_replica(tmp_path, config_of("b", aggregation="replicas"))


def test_an_expert_without_tokens_sends_nothing_and_is_left_alone(tmp_path):
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    a = open_replica(tmp_path, config_of("a"))
    before = state_of(a)
    settled = a.round(trained_rows(a, 0), 0, TOKENS, 1, idle={name})
    sent = {each.run.name for each in settled.messages[0][0].sent}
    assert sent == SHAPES.keys() - {name}
    assert torch.equal(state_of(a)[name], before[name]) and (name, 0) not in a.rule.own


def test_a_routing_bias_is_averaged_whole(tmp_path):
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    a, b = (open_replica(tmp_path, config_of(n, expected_replicas=2)) for n in "ab")
    wanted = torch.zeros(4)
    for each in (a, b):
        wanted += next(rows.values for rows in trained_rows(each, 0) if rows.name == name) / 2
    round_of([a, b], 0)
    assert torch.allclose(state_of(a)[name], wanted, atol=1e-6)


def test_a_damaged_record_is_named(tmp_path):
    a = open_replica(tmp_path, config_of("a"))
    run_round(a, 0)
    open_store(tmp_path).put("round-00000001.json", b'{"round": 1}')
    with pytest.raises(LogError, match="round-00000001.json is not a record"):
        a.catch_up()


def test_replicas_of_two_ranks_and_a_reader_cut_otherwise(tmp_path):
    """Each rank holds half of the rows and talks to nobody but the store."""
    shape, store = (128, 64), open_store(tmp_path, create=True)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(4))

    def open_rank(name, rank, rows):
        config = config_of(name, expected_replicas=2, anchor_every_rounds=1)
        me = identity_of(name, rank, 2)
        shapes = shapes_of(rows)
        exchange = LogExchange(store, config, me, shapes)
        return Replica(config, exchange, rows, Anchors(store, me, shapes))

    def run(name, rank):
        band = whole[64 * rank : 64 * rank + 64]
        replica = open_rank(name, rank, [Rows("w", shape, 64 * rank, band)])
        for number in range(2):
            (mine,) = replica.rows.values()
            stepped = replace(mine, values=mine.values * (0.5 + 0.1 * (name == "a")))
            settled = replica.round([stepped], number * TOKENS, TOKENS, number)
            assert [len(each) for each in settled.messages] == [2, 2]
        return replica

    for name in "ab":
        join(store, config_of(name), "toy")
    ranks = [(name, rank) for name in "ab" for rank in range(2)]
    replicas = together(*(lambda each=each: run(*each) for each in ranks))
    assert not [each for each in replicas if isinstance(each, Exception)], replicas
    reader = open_rank("z", 0, [Rows("w", shape, 0, torch.zeros(shape))])
    assert reader.catch_up() == 0 and reader.number == 2  # an anchor after every round
    for (_, rank), replica in zip(ranks, replicas, strict=True):
        (mine,) = replica.rows.values()
        assert torch.equal(reader.rows["w", 0].values[64 * rank : 64 * rank + 64], mine.values)


def test_one_that_leaves_is_not_waited_for_and_hands_over_what_it_had_not_sent(tmp_path):
    options = {"expected_replicas": 3, "absence": "hand_over", "grace_s": 30.0}
    a, b, c = (open_replica(tmp_path, config_of(n, **options)) for n in "abc")
    round_of([a, b, c], 0)
    b.leave()
    left = {key: values.clone() for key, values in b.rule.own.items()}
    kept = [{key: v.clone() for key, v in each.rule.own.items()} for each in (a, c)]
    assert left and any(values.any() for values in left.values())
    for each in (a, c):
        each._inherit(each._anchors.inherit())
    gained = [
        {key: each.rule.own[key] - before[key] for key in before}
        for each, before in zip((a, c), kept, strict=True)
    ]
    for key, values in left.items():
        assert torch.allclose(gained[0][key] + gained[1][key], values, atol=1e-6)
        assert not (gained[0][key].any() and gained[1][key].any())  # one heir
    (settled, _) = round_of([a, c], 1)  # at once: nobody waits for b
    assert settled.counted == {("a", 1), ("c", 1)} and same_bits([a, c])


def test_a_checkpoint_goes_on_as_if_nothing_had_been(tmp_path):
    """Rows, own and shared buffers and the number of rounds are all there is to save."""
    a, b = (open_replica(tmp_path, config_of(n, expected_replicas=2)) for n in "ab")
    for number in range(2):
        round_of([a, b], number)
    saved = [replace(rows, values=rows.values.clone()) for rows in a.rows.values()]
    own = {key: values.clone() for key, values in a.rule.own.items()}
    error = {key: values.clone() for key, values in a.rule.own.items()}
    again = Replica(a._config, a._exchange, saved, a._anchors, number=a.number)
    again.rule.own.update(own)
    assert again.catch_up() == 0 and again.part_hash() == a.part_hash()
    round_of([again, b], 2)
    assert same_bits([again, b])
    assert all(not torch.equal(again.rule.own[key], error[key]) for key in error)
