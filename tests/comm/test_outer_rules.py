"""Each outer rule against a round worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.config import (
    AveragingConfig,
    DgcConfig,
    DilocoConfig,
    OuterConfig,
    SparseLocoConfig,
)
from gossamer.comm.outer.mean import mean_of, median_factors
from gossamer.comm.outer.message import send_dense, send_sparse
from gossamer.comm.outer.rule import build_rule


def rows(*values, name="w", row_start=0, shape=None):
    tensor = torch.tensor(values, dtype=torch.float32)
    return Rows(name, shape or tuple(tensor.shape), row_start, tensor)


def sparse(values, k):
    return send_sparse("w", tuple(values.shape), 0, values, k)


def outer_step(rule, weights, *deltas, divisor=None):
    """One round of replicas that share a rule of their own each; `weights` in place."""
    sent = [each.send(delta, 0) for each, delta in zip(rule, deltas, strict=True)]
    mean = mean_of([(each, 1.0) for each in sent if each], weights, divisor)
    rule[0].step(weights, mean)
    return sent


def test_averaging_ends_at_the_mean_of_the_weights():
    config = OuterConfig(rule="averaging", averaging=AveragingConfig(lr=1.0))
    shared = rows(1.0, 2.0, -4.0)
    mine, yours = rows(0.5, 2.0, -4.0), rows(1.5, 1.0, -8.0)
    deltas = [replace(each, values=shared.values - each.values) for each in (mine, yours)]
    outer_step([build_rule(config), build_rule(config)], shared, *deltas)
    assert shared.values.tolist() == [1.0, 1.5, -6.0]


def test_averaging_at_half_the_rate_goes_half_the_way():
    config = OuterConfig(rule="averaging", averaging=AveragingConfig(lr=0.5))
    shared = rows(1.0, 2.0)
    outer_step([build_rule(config)], shared, rows(2.0, -4.0))
    assert shared.values.tolist() == [0.0, 4.0]


def test_diloco_is_nesterov_on_the_mean():
    # lr 1/2, momentum 1/2; means 2 and then -1:
    # b1 = 2, w1 = 10 - (2 + 1) / 2 = 8.5; b2 = 1 - 1 = 0, w2 = 8.5 - (-1 + 0) / 2 = 9
    config = OuterConfig(rule="diloco", diloco=DilocoConfig(lr=0.5, momentum=0.5))
    rule, shared = build_rule(config), rows(10.0)
    rule.step(shared, torch.tensor([2.0]))
    assert shared.values.tolist() == [8.5] and rule.shared["w", 0].tolist() == [2.0]
    rule.step(shared, torch.tensor([-1.0]))
    assert shared.values.tolist() == [9.0] and rule.shared["w", 0].tolist() == [0.0]


@pytest.mark.slow
def test_diloco_is_torch_sgd_with_nesterov():
    config = OuterConfig(rule="diloco")
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(40, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    rule, shared = build_rule(config), Rows("w", (40,), 0, start.clone())
    for _ in range(5):
        mean = torch.randn(40, generator=generator)
        rule.step(shared, mean)
        parameter.grad = mean
        sgd.step()
    assert torch.allclose(shared.values, parameter.detach(), rtol=1e-5, atol=1e-6)


SPARSE = OuterConfig(
    rule="sparseloco", sparseloco=SparseLocoConfig(lr=1.0, density=0.4, error_decay=0.5)
)


def test_sparseloco_sends_the_greatest_and_keeps_the_rest():
    # two of five are kept, and powers of two pass the quantiser exactly
    rule, shared = build_rule(SPARSE), rows(0.0, 0.0, 0.0, 0.0, 0.0)
    delta = rows(1.0, -4.0, 0.5, 8.0, -0.25)
    (sent,) = outer_step([rule], shared, delta)
    assert sorted(zip(sent.positions.tolist(), sent.values.tolist(), strict=True)) == [
        (1, -4.0),
        (3, 8.0),
    ]
    assert rule.own["w", 0].tolist() == [1.0, 0.0, 0.5, 0.0, -0.25]
    assert shared.values.tolist() == [0.0, 4.0, 0.0, -8.0, 0.0]
    # a = e / 2 + delta = [2.5, 0, 0.25, 0, 1.875 - 0.125]: what waited goes first
    (sent,) = outer_step([rule], shared, rows(2.0 - 0.5, 0.0, 0.0, 0.0, 1.0 + 0.125))
    assert sorted(zip(sent.positions.tolist(), sent.values.tolist(), strict=True)) == [
        (0, 2.0),
        (4, 1.0),
    ]
    assert rule.own["w", 0].tolist() == [0.0, 0.0, 0.25, 0.0, 0.0]


def test_what_is_sent_and_what_is_kept_add_up_to_what_there_was():
    config = OuterConfig(sparseloco=SparseLocoConfig(density=1 / 64))
    rule = build_rule(config)
    generator = torch.Generator().manual_seed(2)
    delta = Rows("w", (64, 128), 0, torch.randn(64, 128, generator=generator))
    sent = rule.send(delta, 0)
    whole = rule.own["w", 0].view(-1).clone().numpy()
    whole[sent.positions] += sent.values
    assert len(sent.values) == 128
    assert np.allclose(whole, delta.values.view(-1), atol=1e-6)
    others = np.delete(np.arange(64 * 128), sent.positions)
    assert np.array_equal(whole[others], delta.values.view(-1).numpy()[others])


def test_without_error_feedback_nothing_is_kept():
    config = replace(SPARSE, sparseloco=replace(SPARSE.sparseloco, error_feedback=False))
    rule = build_rule(config)
    rule.send(rows(1.0, -4.0, 0.5, 8.0, -0.25), 0)
    assert rule.own == {}


def test_a_block_of_zeros_sends_nothing():
    for name in ("averaging", "diloco", "sparseloco"):
        assert build_rule(replace(SPARSE, rule=name)).send(rows(0.0, 0.0), 0) is None


def test_both_aggregations_of_disjoint_and_common_elements():
    mine = sparse(torch.tensor([4.0, 2.0, 0.0, 0.0]), 2048)
    yours = sparse(torch.tensor([0.0, 4.0, 8.0, 0.0]), 2048)
    pieces = [(mine, 1.0), (yours, 1.0)]
    like = rows(0.0, 0.0, 0.0, 0.0)
    assert mean_of(pieces, like, None).tolist() == [4.0, 3.0, 8.0, 0.0]
    assert mean_of(pieces, like, 2).tolist() == [2.0, 3.0, 4.0, 0.0]
    assert mean_of(pieces, like, 4).tolist() == [1.0, 1.5, 2.0, 0.0]


def test_rows_cut_elsewhere_than_the_messages():
    values = torch.arange(1.0, 25.0).view(6, 4)
    dense = [send_dense("w", (6, 4), start, values[start : start + 3]) for start in (0, 3)]
    top = send_sparse("w", (6, 4), 0, values, 4096 // 5)
    middle = rows(*torch.zeros(2, 4).tolist(), row_start=2, shape=(6, 4))
    assert torch.equal(mean_of([(each, 1.0) for each in dense], middle, None), values[2:4])
    last = rows(*torch.zeros(1, 4).tolist(), row_start=5, shape=(6, 4))
    everything = np.zeros(24, np.float32)
    everything[top.positions] = top.values
    assert mean_of([(top, 1.0)], last, 1).view(-1).tolist() == everything[20:].tolist()


def test_a_norm_a_thousand_times_too_large_is_brought_down_to_the_median():
    honest = [send_dense("w", (4,), 0, torch.tensor([3.0, 4.0, 0.0, 0.0]) * s) for s in (1, 2)]
    cheat = send_dense("w", (4,), 0, torch.tensor([0.0, 0.0, 3000.0, 4000.0]))
    three = [[honest[0]], [honest[1]], [cheat]]
    assert median_factors(three, 1.0) == [[1.0], [1.0], [10 / 5000]]
    assert median_factors(three, 3.0) == [[1.0], [1.0], [30 / 5000]]
    assert median_factors(three, 0.0) == [[1.0], [1.0], [1.0]]
    assert median_factors([[honest[1]], [honest[0]]], 1.0) == [[0.5], [1.0]]
    assert median_factors([[honest[0]], [cheat]], 1.0) == [[1.0], [5 / 5000]]
    assert median_factors([[cheat]], 1.0) == [[1.0]]


def test_the_median_is_among_those_that_send_the_same_rows():
    one = [send_dense(name, (1,), 0, torch.tensor([2.0])) for name in ("a", "b")]
    other = [send_dense("a", (1,), 0, torch.tensor([8.0]))]
    assert median_factors([one, other], 1.0) == [[1.0, 1.0], [0.25]]


DGC = OuterConfig(
    rule="dgc",
    inner_steps=1,
    exchange="collective",
    dgc=DgcConfig(density=1 / 4096, momentum=0.5),
)


def test_dgc_corrects_momentum_and_masks_what_was_sent():
    rule = build_rule(DGC)
    # u = g = [4, 1], v = u: sends the 4
    sent = rule.send(rows(4.0, 1.0), 0)
    assert (sent.positions.tolist(), sent.values.tolist()) == ([0], [4.0])
    assert rule.own["w", 0].tolist() == [0.0, 1.0]
    assert rule.own["momentum of w", 0].tolist() == [0.0, 1.0]
    # u = [1, 0.5 + 0.5], v = [1, 2]: sends the 2
    sent = rule.send(rows(1.0, 0.5), 1)
    assert (sent.positions.tolist(), sent.values.tolist()) == ([1], [2.0])
    assert rule.own["w", 0].tolist() == [1.0, 0.0]
    assert rule.own["momentum of w", 0].tolist() == [1.0, 0.0]
    gradient = rows(9.0, 9.0)
    rule.step(gradient, torch.tensor([0.0, 2.0]))
    assert gradient.values.tolist() == [0.0, 2.0]


def test_dgc_warms_up_and_clips():
    config = DgcConfig(density=0.001, warmup_densities=(0.25, 0.0625), warmup_steps=3, max_norm=5.0)
    rule = build_rule(replace(DGC, dgc=config))
    densities = [rule.density_at(number) for number in range(8)]
    assert densities == [0.25] * 3 + [0.0625] * 3 + [0.001] * 2
    assert build_rule(DGC).density_at(0) == DGC.dgc.density
    rule.send(rows(30.0, 40.0), 7)
    total = rule.own["w", 0].clone()
    assert math.isclose(float(total.norm() ** 2), 9.0, rel_tol=1e-6)  # 4 was sent, 3 waits


@pytest.mark.parametrize(
    ("absence", "after"), [("keep", 8.0), ("decay", 2.0), ("drop", None), ("hand_over", 8.0)]
)
def test_the_error_buffer_of_one_that_was_absent(absence, after):
    rule = build_rule(replace(SPARSE, absence=absence))
    rule.own["w", 0] = torch.tensor([8.0])
    rule.absent(2)
    assert (rule.own["w", 0].tolist() == [after]) if after else not rule.own


@pytest.mark.parametrize(("absence", "after"), [("keep", [1.0, 2.0]), ("drop", [0.0, 1.0])])
def test_what_never_counted_returns_by_the_policy(absence, after):
    config = replace(SPARSE, absence=absence, sparseloco=replace(SPARSE.sparseloco, density=1e-9))
    rule = build_rule(config)
    sent = rule.send(rows(1.0, 2.0, 0.0), 0)
    rule.own["w", 0] = torch.tensor([0.0, 1.0, 0.0])
    rule.take_back(sent)
    expected = [0.0, 1.0 + 2.0 * (absence == "keep"), 0.0]
    assert rule.own["w", 0].tolist() == expected


def test_a_rule_by_import_path_and_an_unknown_one():
    path = "gossamer.comm.outer.rule:Averaging"
    assert type(build_rule(OuterConfig(rule=path))).__name__ == "Averaging"
    with pytest.raises(ValueError, match="rule must be one of averaging, diloco, sparseloco, dgc"):
        build_rule(OuterConfig(rule="adam"))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"aggregation": "sum"}, "aggregation"),
        ({"quorum": 0}, "quorum"),
        ({"replica": "a/b"}, "replica"),
        ({"rule": "dgc"}, "inner_steps"),
        ({"rule": "dgc", "inner_steps": 1}, "exchange"),
        ({"late": "always"}, "late"),
        ({"grace_s": -1.0}, "grace_s"),
        ({"clip_to_median": -1.0}, "clip_to_median"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(options, field):
    with pytest.raises(ValueError, match=field):
        OuterConfig(**options)
