"""What every outer rule owes: sound messages, one step for all, nothing but its own buffers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.mean import mean_of
from gossamer.comm.outer.message import Message, pack_message, unpack_message
from gossamer.comm.outer.rule import OUTER_RULES, build_rule

SHAPE = (64, 128)


def config_of(name):
    per_step = name == "dgc"
    exchange = "collective" if per_step else "log"
    return OuterConfig(rule=name, inner_steps=1 if per_step else 30, exchange=exchange)


def random_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    return Rows("w", SHAPE, 0, torch.randn(SHAPE, generator=generator))


@pytest.fixture(params=OUTER_RULES)
def config(request):
    return config_of(request.param)


def test_a_message_crosses_the_wire_as_it_is(config):
    sent = build_rule(config).send(random_rows(1), 0)
    message = Message(
        run_id="r", round=0, replica="a", base_hash="0" * 16, inner_steps=1, tokens=1, sent=[sent]
    )
    (found,) = unpack_message(pack_message(message), {"w": SHAPE}).sent
    assert found.norm == sent.norm and np.array_equal(found.values, sent.values)
    assert sent.positions is None or np.array_equal(found.positions, sent.positions)


def test_the_sum_of_rounds_moves_the_rows_against_the_mean(config):
    rule, rows = build_rule(config), Rows("w", SHAPE, 0, torch.zeros(SHAPE))
    mean = mean_of([(rule.send(random_rows(2), 0), 1.0)], rows, None)
    rule.step(rows, mean.clone())
    moved = rows.values if rule.on_gradients else -rows.values
    assert float((moved * mean).sum()) > 0


def test_rules_that_see_the_same_come_to_the_same_bits(config):
    rules = [build_rule(config) for _ in range(2)]
    weights = [Rows("w", SHAPE, 0, random_rows(3).values) for _ in rules]
    for number in range(3):
        sent = [rule.send(random_rows(number), number) for rule in rules]
        assert np.array_equal(sent[0].values, sent[1].values)
        for rule, each in zip(rules, weights, strict=True):
            rule.step(each, mean_of([(s, 1.0) for s in sent], each, None))
        assert torch.equal(weights[0].values, weights[1].values)


def test_shared_state_does_not_depend_on_what_a_replica_sent(config):
    rules = [build_rule(config) for _ in range(2)]
    rules[0].send(random_rows(4), 0)
    for rule in rules:
        rule.step(random_rows(5), torch.ones(SHAPE))
    assert rules[0].shared.keys() == rules[1].shared.keys()
    for key, values in rules[0].shared.items():
        assert torch.equal(values, rules[1].shared[key])


def test_a_rule_made_again_from_its_buffers_goes_on(config):
    rule, other = build_rule(config), build_rule(config)
    weights = [random_rows(6), random_rows(6)]
    rule.send(random_rows(7), 0)
    rule.step(weights[0], torch.ones(SHAPE))
    other.step(weights[1], torch.ones(SHAPE))
    for mine, theirs in ((other.own, rule.own), (other.shared, rule.shared)):
        mine.update({key: values.clone() for key, values in theirs.items()})
    for each, rows in zip((rule, other), weights, strict=True):
        sent = each.send(random_rows(8), 1)
        each.step(rows, mean_of([(sent, 1.0)], rows, None))
    assert torch.equal(weights[0].values, weights[1].values)


def test_zeros_send_nothing_and_absence_is_survived(config):
    rule = build_rule(replace(config, absence="drop"))
    assert rule.send(Rows("w", SHAPE, 0, torch.zeros(SHAPE)), 0) is None
    sent = rule.send(random_rows(9), 1)
    rule.take_back(sent)
    rule.absent(3)
    assert rule.own == {}


def test_infinities_are_not_sent(config):
    values = torch.zeros(SHAPE)
    values[3, 5] = float("inf")
    with pytest.raises(ValueError, match="w: .*NaN and infinity cannot be sent"):
        build_rule(config).send(Rows("w", SHAPE, 0, values), 0)
