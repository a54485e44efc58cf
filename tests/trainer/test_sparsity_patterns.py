"""n of every m, exact with ties; frames of structure decay; blocks."""

import pytest
import torch
from gossamer.trainer.sparsity.config import (
    DistributionConfig,
    FlowConfig,
    PatternConfig,
    RuleConfig,
    ScheduleConfig,
    SparsityConfig,
)
from gossamer.trainer.sparsity.method import Horizon, Point
from gossamer.trainer.sparsity.patterns import best_of_groups, block_scores, frame_at, frames
from gossamer.trainer.sparsity.plan import SparsityPlan
from gossamer.trainer.sparsity.recipes import RECIPES
from gossamer.trainer.sparsity.schedules import Window
from hypothesis import given
from hypothesis import strategies as st
from sparse_bands import ALONE, EXPERTS, make_bands


@given(data=st.data())
def test_groups_keep_exactly_n_of_m_and_of_ties_the_first(data):
    m = data.draw(st.integers(2, 8))
    n = data.draw(st.integers(1, m - 1))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=2 * m, max_size=2 * m), min_size=1)
    )
    mask = best_of_groups(torch.tensor(rows, dtype=torch.int32), n, m)
    for row, kept in zip(rows, mask.tolist(), strict=True):
        for start in (0, m):
            group = row[start : start + m]
            best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
            assert [i for i in range(m) if kept[start + i]] == sorted(best)


def advanced(name_or_config, steps, total=100):
    """Bands, with weights that move between the updates, and every mask they had."""
    config = RECIPES.get(name_or_config, name_or_config)
    plan = SparsityPlan(config)
    plan.begin(EXPERTS, Horizon(total))
    bands, found = make_bands(EXPERTS), {}
    for step in steps:
        masks = plan.update(bands, Point(step), ALONE)
        for number, (band, mask) in enumerate(zip(bands, masks, strict=True)):
            band.mask_RC = mask
            band.weight_RC = band.weight_RC.roll(number + 1, 1)  # keeps the ties
        found[step] = masks
    return plan, found


def groups_of(mask, m):
    return mask.view(mask.shape[0], -1, m).sum(-1).unique().tolist()


@pytest.mark.parametrize(("name", "n", "m"), [("sr_ste", 2, 4), ("ast", 2, 4), ("pgf_mask", 1, 8)])
def test_masks_are_n_of_m_after_every_update(name, n, m):
    _, found = advanced(name, range(0, 100, 10))
    for masks in found.values():
        assert all(groups_of(mask, m) == [n] for mask in masks)
    assert any(not torch.equal(a, b) for a, b in zip(found[0], found[90], strict=True))


def test_frames_of_structure_decay():
    stepwise = PatternConfig(kind="n_m", n=1, m=32, decay="stepwise")
    assert frames(stepwise) == [(31, 32), (16, 32), (8, 32), (4, 32), (2, 32), (1, 32)]
    geometric = PatternConfig(kind="n_m", n=1, m=8, decay="geometric")
    assert frames(geometric) == [(8, 64), (4, 32), (2, 16), (1, 8)]
    within = Window(100.0, 500.0)
    found = [frame_at(geometric, within, x) for x in (99, 100, 199, 200, 499, 500, 999)]
    assert found == [None, (8, 64), (8, 64), (4, 32), (1, 8), (1, 8), (1, 8)]


def test_structure_decay_goes_through_its_frames():
    """Of 100 steps, dense up to 10, four frames of 20, 1:8 from 70 on."""
    steps = (0, 10, 30, 50, 70, 90)
    plan = SparsityPlan(RECIPES["pgf_geometric"])
    plan.begin(EXPERTS, Horizon(100))
    bands = make_bands(EXPERTS)
    for step, (n, m) in zip(
        steps, [(1, 1), (8, 64), (4, 32), (2, 16), (1, 8), (1, 8)], strict=True
    ):
        for mask in plan.update(bands, Point(step), ALONE):
            assert groups_of(mask, m) == [n]


def test_a_static_n_m_mask_stays():
    rule = RuleConfig(pattern=PatternConfig(kind="n_m"), schedule=ScheduleConfig(every_steps=1))
    plan, found = advanced(SparsityConfig(rules=(rule,)), (0, 50))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[50], strict=True))
    assert not plan.step(Point(50)).updates


@pytest.mark.parametrize("kind", ["masked", "ste", "soft"])
def test_n_of_m_begins_where_the_schedule_does(kind):
    rule = RuleConfig(
        pattern=PatternConfig(kind="n_m"),
        schedule=ScheduleConfig(every_steps=10, start=0.3),
        flow=FlowConfig(kind=kind),
    )
    _, found = advanced(SparsityConfig(rules=(rule,)), (0, 30, 40))
    assert [groups_of(found[step][0], 4) for step in found] == [[4], [2], [2]]


def test_erk_gives_every_group_its_floor():
    rule = RuleConfig(
        pattern=PatternConfig(kind="n_m_floor"),
        distribution=DistributionConfig(kind="erk", floor=0.5),
        schedule=ScheduleConfig(density=0.6),
    )
    _, found = advanced(SparsityConfig(rules=(rule,)), (0,))
    assert min(groups_of(mask, 4)[0] for mask in found[0]) == 2


def test_journeys_2_of_4_never_takes_more_than_two():
    rule = RuleConfig(
        pattern=PatternConfig(kind="n_m_floor"),
        schedule=ScheduleConfig(kind="geometric", density=0.5, every_steps=10),
    )
    _, found = advanced(SparsityConfig(rules=(rule,)), (0, 50, 100))
    assert all(min(groups_of(mask, 4)) >= 2 for masks in found.values() for mask in masks)
    assert {groups_of(mask, 4)[0] for mask in found[100]} == {2}
    assert sum(int(m.sum()) for m in found[100]) == sum(m.numel() for m in found[100]) // 2


def test_blocks_are_kept_whole_by_their_sum():
    rule = RuleConfig(
        pattern=PatternConfig(kind="block", block_rows=16, block_columns=8),
        schedule=ScheduleConfig(density=0.25),
        flow=FlowConfig(kind="ste"),
    )
    plan = SparsityPlan(SparsityConfig(rules=(rule,)))
    shapes = {"w_proj.weight": (64, 96)}
    plan.begin(shapes, Horizon(100))
    (band,) = make_bands(shapes)
    (mask,) = plan.update([band], Point(0), ALONE)
    sums = band.weight_RC.abs().view(4, 16, 12, 8).sum((1, 3))
    best = sums.flatten().topk(12).indices
    expected = torch.zeros(48, dtype=torch.bool).scatter_(0, best, True).view(4, 12)
    assert torch.equal(mask, expected.repeat_interleave(16, 0).repeat_interleave(8, 1))


@given(
    height=st.sampled_from([1, 2, 4]), width=st.integers(1, 9), cut=st.integers(1, 3), of=st.data()
)
def test_block_sums_do_not_depend_on_the_band(height, width, cut, of):
    seed = of.draw(st.integers(0, 99))
    score = torch.rand(4 * height, 3 * width, generator=torch.Generator().manual_seed(seed))
    whole = block_scores(score, height, width)
    parts = [block_scores(part, height, width) for part in score.split(cut * height)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.allclose(whole, score.view(4, height, 3, width).sum((1, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        (PatternConfig(kind="n_m", n=2, m=5), "64 columns; expected a multiple of m=5"),
        (PatternConfig(kind="block", block_rows=64), "96 x 64; expected whole blocks of 64 x 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(pattern, sentence):
    plan = SparsityPlan(SparsityConfig(rules=(RuleConfig(pattern=pattern),)))
    with pytest.raises(ValueError, match=sentence):
        plan.begin({"w_proj.weight": (96, 64)}, Horizon(10))


def test_rows_of_several_lengths_do_not_compete():
    rows = PatternConfig(kind="block", block_columns=0)
    rule = RuleConfig(pattern=rows, distribution=DistributionConfig(kind="global"))
    with pytest.raises(ValueError, match="global with blocks of sizes .*; expected one size"):
        SparsityPlan(SparsityConfig(rules=(rule,))).begin(EXPERTS, Horizon(10))
