"""The outer state in a checkpoint: a replica that is put back goes on as the one it was."""

import json
from dataclasses import replace

import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.anchor import Anchors
from gossamer.comm.outer.config import DilocoConfig
from gossamer.comm.outer.replica import Replica
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import Checkpoint
from gossamer.trainer.checkpoint_writer import Target, take_snapshot, write_checkpoint
from gossamer.trainer.outer_state import outer_kinds, put_back, shared_weights
from toy_replicas import CONFIG, TOKENS, open_replica, trained_rows


def save(folder, replica) -> Checkpoint:
    beside = outer_kinds(replica)
    owned = [
        Owned(r.name, r.shape, r.row_start, r.row_start + len(r.values), r.values, beside[key])
        for key, r in replica.rows.items()
    ]
    target = Target(root=str(folder / "checkpoints"), step=1, epoch=1)
    write_checkpoint(target, take_snapshot(owned, 0), json.dumps({"num_updates": 1}))
    return Checkpoint(target.url)


def read_back(checkpoint, replica, config) -> Replica:
    """Another one from the checkpoint, in the place of `replica`, its rows cut otherwise."""
    owned = [
        Rows(r.name, r.shape, start, r.values[start : start + 32])
        for r in replica.rows.values()
        for start in (range(0, len(r.values), 32) if len(r.shape) > 1 else [0])
    ]
    exchange = replica._exchange
    anchors = Anchors(exchange._store, exchange.identity, exchange._inbox._shapes)
    rows = shared_weights(checkpoint, owned)
    again = Replica(config, exchange, rows, anchors, replica.number)
    put_back(again, checkpoint, owned)
    return again


def whole(buffers) -> dict:
    """Buffers by name, whatever their rows are cut like."""
    pieces: dict[str, dict] = {}
    for (name, start), values in buffers.items():
        pieces.setdefault(name, {})[start] = values
    return {name: torch.cat([each[s] for s in sorted(each)]) for name, each in pieces.items()}


def state(replica) -> tuple:
    rows = {key: rows.values for key, rows in replica.rows.items()}
    return tuple(whole(each) for each in (rows, replica.rule.shared, replica.rule.own))


def assert_alike(one, other):
    for found, expected in zip(state(one), state(other), strict=True):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.equal(found[name], values), name


@pytest.mark.parametrize("rule", ["averaging", "diloco", "sparseloco"])
def test_what_is_saved_comes_back_however_rows_are_cut(tmp_path, rule):
    config = replace(CONFIG, replica="a", rule=rule, diloco=DilocoConfig(momentum=0.5))
    replica = open_replica(tmp_path / "log", config)
    for number in range(2):
        replica.round(trained_rows(replica, number * TOKENS), number * TOKENS, TOKENS, 1)
    again = read_back(save(tmp_path, replica), replica, config)
    assert again.number == 2 and not again.pending
    assert_alike(again, replica)
    assert again.part_hash() == replica.part_hash()
    assert bool(replica.rule.shared) == (rule == "diloco")
    assert bool(replica.rule.own) == (rule == "sparseloco")


@pytest.mark.parametrize("late", ["counts", "is lost"])
def test_a_message_that_may_count_yet_is_saved_with_it(tmp_path, late):
    config = replace(CONFIG, grace_s=0.0, deadline_s=2.0, expected_for_rounds=1)
    a, b = (open_replica(tmp_path / "log", replace(config, replica=name)) for name in "ab")
    a.round(trained_rows(a, 0), 0, TOKENS, 1)  # without b
    b.round(trained_rows(b, 0), 0, TOKENS, 1)
    assert b.pending and b.number == 1
    again = read_back(save(tmp_path, b), b, replace(config, replica="b"))
    assert again.pending.keys() == {0}
    if late == "is lost":  # a newer incarnation's messages alone are looked at
        open_replica(tmp_path / "log", replace(config, replica="b"), takeover=True)
    a.round(trained_rows(a, TOKENS), TOKENS, TOKENS, 1)
    assert (("b", 0) in a._exchange.settle(1).counted) == (late == "counts")
    before = whole(b.rule.own)["model.norm.weight"].clone()
    for each in (b, again):
        each.catch_up(2)
        assert not each.pending
    assert_alike(again, b)
    # what was lost is in the error buffer again
    assert torch.equal(before, whole(b.rule.own)["model.norm.weight"]) == (late == "counts")
