"""One change of masks of every method, computed by hand on a few weights."""

import math
from dataclasses import replace

import pytest
import torch
from gossamer.trainer.sparsity.config import (
    RuleConfig,
    ScheduleConfig,
    SparsityConfig,
)
from gossamer.trainer.sparsity.flow import Flow
from gossamer.trainer.sparsity.method import Band, Horizon, Point
from gossamer.trainer.sparsity.plan import SparsityPlan
from gossamer.trainer.sparsity.recipes import RECIPES
from gossamer.trainer.sparsity.rule import Rule
from gossamer.trainer.sparsity.selection import uniform
from sparse_bands import ALONE, EXPERTS, make_bands

NAME = "a_proj.weight"


def band(weights, kept=None, gradients=None, name=NAME, tokens=None) -> Band:
    """One row of weights; kept: columns that the mask keeps, all if None."""
    weight = torch.tensor([weights], dtype=torch.float32)
    mask = torch.ones_like(weight, dtype=torch.bool)
    if kept is not None:
        mask = torch.zeros_like(mask).index_fill_(1, torch.tensor(kept), True)
    gradient = None if gradients is None else torch.tensor([gradients], dtype=torch.float32)
    return Band(name, tuple(weight.shape), 0, weight, mask, gradient, tokens=tokens)


def updated(config, bands, step, total=100):
    """Kept columns of each band after the update at `step`."""
    plan = SparsityPlan(config)
    plan.begin({b.name: b.shape for b in bands}, Horizon(total))
    masks = plan.update(bands, Point(step), ALONE)
    return [mask[0].nonzero()[:, 0].tolist() for mask in masks]


def rule(recipe: str, **changes) -> SparsityConfig:
    (found,) = RECIPES[recipe].rules
    changed = {axis: replace(getattr(found, axis), **fields) for axis, fields in changes.items()}
    return SparsityConfig(rules=(replace(found, **changed),))


LAST_DENSITY = {
    "static_uniform": 0.1,
    "static_erk": 0.1,
    "spdf": 1.0,
    "spdf_variable": 1.0,
    "journey": 0.2,
    "journey_per_expert": 0.2,
    "gmp": 0.1,
    "set": 0.1,
    "rigl": 0.1,
    "granet": 0.1,
    "granet_sparse": 0.1,
    "granet_uniform": 0.1,
    "ste": 0.5,
    "sr_ste": 0.5,
    "pgf_mask": 0.125,
    "pgf_stepwise": 0.125,
    "pgf_geometric": 0.125,
    "acdc": 0.1,
    "ast": 0.5,
    "cast": 0.5,
}
"""As the papers have it."""


def test_every_recipe_is_in_the_table():
    assert list(LAST_DENSITY) == list(RECIPES)


@pytest.mark.parametrize("total", [2000, 2060])
@pytest.mark.parametrize("name", LAST_DENSITY)
def test_every_recipe_ends_at_its_density_and_only_due_updates_change_a_mask(name, total):
    shapes = {n: s for n, s in EXPERTS.items() if "layers.0" in n}
    plan = SparsityPlan(RECIPES[name])
    names = plan.begin(shapes, Horizon(total))
    bands = make_bands(shapes)
    steps = {round(share * total) for share in (0.8, 0.87)}  # where SPDF and its variable one end
    for step in sorted({*range(0, total + 1, 100), *steps}):
        point = Point(step)
        due = plan.step(point).updates
        assert due in (frozenset(), frozenset(names))
        masks = plan.update(bands, point, ALONE)
        if not due:
            assert all(m is b.mask_RC for b, m in zip(bands, masks, strict=True))
        for b, mask in zip(bands, masks, strict=True):
            b.mask_RC = mask
    expected = LAST_DENSITY[name] * sum(b.mask_RC.numel() for b in bands)
    assert sum(int(b.mask_RC.sum()) for b in bands) == pytest.approx(expected, abs=1)


def test_static_keeps_the_highest_draws_and_never_changes():
    config = rule("static_uniform", schedule={"density": 0.25})
    draws = uniform(NAME, 0, 8, "mask 1 0 keep")
    assert updated(config, [band([1.0] * 8)], 0) == [sorted(draws.topk(2).indices.tolist())]
    plan = SparsityPlan(config)
    plan.begin({NAME: (1, 8)}, Horizon(1000))
    assert not any(plan.step(Point(step)).updates for step in range(1, 1001))


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("journey_per_expert", {"schedule": {"every_steps": 10}}),  # begins at .0998 of 40 steps
        ("gmp", {"schedule": {"kind": "one_shot", "start": 0.1, "every_steps": 10}}),
        ("pgf_stepwise", {"schedule": {"start": 0.0}, "flow": {"kind": "masked"}}),
    ],
)
def test_what_is_pruned_at_once_goes_by_the_criterion(recipe, changes):
    """A window may begin at step 0: a dense matrix is pruned there, no mask is drawn."""
    weights = [0.1, 9.0, 0.2, 8.0, 0.3, 7.0, 0.4, 6.0]
    (kept,) = updated(rule(recipe, **changes), [band(weights)], 0, total=40)
    assert 0 < len(kept) < 8
    assert kept == sorted(sorted(range(8), key=lambda i: -weights[i])[: len(kept)])


def test_seeds_differ():
    kept = set()
    for seed in range(20):
        config = replace(rule("static_uniform", schedule={"density": 0.25}), seed=seed)
        kept.add(tuple(updated(config, [band([1.0] * 8)], 0)[0]))
    assert len(kept) > 10


def test_gmp_prunes_the_smallest_of_the_kept():
    """Half way through the window the cubic keeps .1 + .9 / 8 = .2125 of 8: 2, not a pruned 9."""
    config = rule("gmp", schedule={"every_steps": 10, "start": 0.0, "stop": 1.0})
    weights = [9.0, -0.1, 3.0, -4.0, 0.2, 1.0, -2.0, 0.0]
    assert updated(config, [band(weights, kept=[1, 2, 3, 4, 5, 6])], 50) == [[2, 3]]


AT_ONCE = {"kind": "one_shot", "unit": "steps", "start": 0.1, "every_steps": 10}
TWO = [band([5.0, 4.0, 3.0, 2.0, 1.0]), band([0.5, 0.4, 0.3, 0.2, 0.1], name="b_proj.weight")]


def test_journey_ranks_all_matrices_together_and_per_expert_does_not():
    """20 % of 10, of all or of each."""
    assert updated(rule("journey", schedule=AT_ONCE), TWO, 10) == [[0, 1], []]
    assert updated(rule("journey_per_expert", schedule=AT_ONCE), TWO, 10) == [[0], [0]]


def test_a_floor_saves_the_cold_expert_and_the_budget_stays():
    floored = rule("journey", schedule=AT_ONCE, distribution={"floor": 0.2})
    assert updated(floored, TWO, 10) == [[0], [0]]
    half = AT_ONCE | {"density": 0.5}
    ceiled = rule("journey", schedule=half, distribution={"ceiling": 0.7})
    assert updated(ceiled, TWO, 10) == [[0, 1, 2], [0, 1]]


def test_layers_are_pools_of_their_own():
    names = [f"layers.{i}.{p}_proj.weight" for i in (1, 10) for p in "ab"]
    bands = [band([8.0 - 2 * i, 7.0 - 2 * i], name=name) for i, name in enumerate(names)]
    config = rule("journey", schedule=AT_ONCE | {"density": 0.5}, distribution={"kind": "layer"})
    assert updated(config, bands, 10) == [[0, 1], [], [0, 1], []]


RIGL = {"schedule": {"density": 0.5, "every_steps": 10}, "regrow": {"share": 0.4, "stop": 1.0}}


def test_rigl_trades_the_weakest_for_the_steepest():
    """Step 50 of 100: f = .2 (1 + cos(pi / 2)) = .2, of 5 kept: 1 goes, the smallest |w|, column 4;
    1 comes, the greatest |g| outside what stays."""
    weights = [5.0, -4.0, 3.0, 2.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]
    gradients = [9.0, 9.0, 9.0, 9.0, 0.5, 0.1, -0.7, 0.3, 0.6, 0.0]
    kept = [0, 1, 2, 3, 4]
    config = rule("rigl", **RIGL)
    assert updated(config, [band(weights, kept, gradients)], 50) == [[0, 1, 2, 3, 6]]
    gradients[4] = -0.8  # what was just dropped may come back
    assert updated(config, [band(weights, kept, gradients)], 50) == [kept]


def test_rigl_drops_less_and_less_and_then_nothing():
    config = rule("rigl")
    found = Rule(config.rules[0], EXPERTS, Horizon(1000), seed=1)
    assert [found.drop_share(x) for x in (0, 375, 750)] == pytest.approx([0.3, 0.15, 0.0])
    plan = SparsityPlan(config)
    plan.begin(EXPERTS, Horizon(1000))
    assert [s for s in range(1001) if plan.step(Point(s)).updates] == list(range(0, 750, 100))
    plan = SparsityPlan(rule("rigl", schedule={"every_steps": 250}))
    plan.begin(EXPERTS, Horizon(1000))
    assert [s for s in range(1001) if plan.step(Point(s)).updates] == [0, 250, 500]


def test_rigl_keeps_every_matrixs_count_and_agrees_with_a_plain_one():
    plan = SparsityPlan(rule("rigl", schedule={"density": 0.3}))
    shape = (128, 64)
    plan.begin({NAME: shape}, Horizon(1000))
    bands = make_bands({NAME: shape})
    for each, mask in zip(bands, plan.update(bands, Point(0), ALONE), strict=True):
        each.mask_RC = mask
    weight, old, gradient = (
        torch.cat([getattr(each, field) for each in bands]).flatten()
        for field in ("weight_RC", "mask_RC", "gradient_RC")
    )
    new = torch.cat(plan.update(bands, Point(300), ALONE)).flatten()
    kept = int(old.sum())
    drop = int(0.15 * (1 + math.cos(math.pi * 300 / 750)) * kept)
    best = sorted(old.nonzero()[:, 0].tolist(), key=lambda i: (-abs(float(weight[i])), i))
    stay = set(best[: kept - drop])
    free = [i for i in range(len(old)) if i not in stay]
    grown = sorted(free, key=lambda i: (-abs(float(gradient[i])), i))[:drop]
    assert set(new.nonzero()[:, 0].tolist()) == stay | set(grown)
    assert int(new.sum()) == kept and drop > 100


def test_set_grows_by_the_draw():
    weights = [5.0, -4.0, 3.0, 2.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]
    config = rule("set", **RIGL)
    (kept,) = updated(config, [band(weights, [0, 1, 2, 3, 4])], 50)
    draws = uniform(NAME, 0, 10, "mask 1 50 grow")
    assert kept[:4] == [0, 1, 2, 3]
    assert kept[4:] == [4 + int(draws[4:].argmax())]


def test_granet_prunes_over_all_and_trades_in_each():
    """Step 20, half of its window of 40: .1 + .9 / 8 = .2125 of 20, so 4 over both, 3 and 1; then
    r = .005 + .2475 (1 + cos(.2 pi)) = .45: of 3, two go and two come, of 1, one."""
    config = rule("granet", schedule={"every_steps": 10, "stop": 0.4})
    strong, weak = [9.0, 8.0, 7.0] + [0.1] * 7, [6.0] + [0.05] * 9
    steep = [0.0] * 8 + [3.0, 4.0]
    bands = [band(strong, None, steep), band(weak, None, steep, name="b_proj.weight")]
    assert updated(config, bands, 20) == [[0, 8, 9], [9]]


def test_an_expert_without_tokens_keeps_its_mask():
    """Its gradient is 0 everywhere; grown by it, the first columns would come."""
    weights, gradients = [5.0, 0.1, 0.2, 0.0], [0.0, 0.0, 0.0, 1.0]
    bands = [
        band(weights, [0, 1], gradients, tokens=7),
        band(weights, [0, 1], [0.0] * 4, name="b_proj.weight", tokens=0),
    ]
    config = rule("rigl", schedule={"density": 0.5, "every_steps": 10}, regrow={"share": 1.0})
    for least, cold in ((1, [0, 1]), (8, [0, 1])):
        few = replace(config.rules[0], regrow=replace(config.rules[0].regrow, min_tokens=least))
        warm = [0, 3] if least == 1 else [0, 1]
        assert updated(replace(config, rules=(few,)), bands, 30) == [warm, cold]


def test_the_window_of_dense_gradients():
    plan = SparsityPlan(rule("rigl", regrow={"window_steps": 3}))
    names = plan.begin(EXPERTS, Horizon(1000))
    wanted = [step for step in range(1000) if plan.step(Point(step)).scores == frozenset(names)]
    assert wanted == [e - k for e in range(100, 750, 100) for k in (3, 2, 1)]
    plan = SparsityPlan(rule("set"))
    plan.begin(EXPERTS, Horizon(1000))
    assert not any(plan.step(Point(step)).scores for step in range(1000))


@pytest.mark.parametrize("criterion", ["gradient", "saliency", "momentum"])
@pytest.mark.parametrize("kind", ["ste", "soft", "dense"])
def test_before_there_are_gradients_live_weights_are_kept_by_magnitude(criterion, kind):
    config = rule("ste", schedule={"every_steps": 2}, flow={"kind": kind})
    config = replace(config, rules=(replace(config.rules[0], criterion=criterion),))
    weights, gradients = [4.0, 0.0, 3.0, 0.0], [0.0, 1.0, 0.0, 1.0]
    assert updated(config, [band(weights)], 0) == [[0, 2]]
    if criterion == "gradient":
        assert updated(config, [band(weights, None, gradients)], 10) == [[1, 3]]
    if criterion != "momentum":  # a replica that comes late has no window
        assert updated(config, [band(weights)], 10) == [[0, 2]]


def test_growth_by_gradient_never_goes_without():
    with pytest.raises(ValueError, match="comes without its window's gradient; expected one"):
        updated(rule("rigl", **RIGL), [band([1.0] * 10, [0, 1])], 50)


def test_a_target_holds_where_masks_do():
    """Frozen at step 47, after a change at 40, of a fall from 10 to 80."""
    config = rule(
        "gmp",
        schedule={"kind": "linear", "start": 0.1, "stop": 0.8, "every_steps": 10},
        end={"at": 0.47},
    )
    plan = SparsityPlan(config)
    (name,) = plan.begin({NAME: (1, 70)}, Horizon(100))
    assert [s for s in range(101) if plan.step(Point(s)).updates] == [0, 20, 30, 40]
    found = [plan.target(Point(step))[name] for step in (30, 40, 47, 60, 100)]
    assert found == pytest.approx([1 - 0.9 * 2 / 7] + [1 - 0.9 * 3 / 7] * 4)


def test_masks_of_an_end_have_their_gradients_too():
    """Changes at 10, 20, ... 90, and the last at 95."""
    config = rule("ast", end={"at": 0.95})
    plan = SparsityPlan(replace(config, rules=(replace(config.rules[0], criterion="saliency"),)))
    names = plan.begin(EXPERTS, Horizon(100))
    scored = [step for step in range(100) if plan.step(Point(step)).scores == frozenset(names)]
    assert scored == [*range(9, 90, 10), 94]


def test_spdf_ends_dense_with_a_warm_learning_rate():
    config = rule("spdf_variable", end={"at": 0.5, "rewarm": 0.04})
    plan = SparsityPlan(config)
    (name,) = plan.begin({NAME: (1, 10)}, Horizon(100))
    assert plan.target(Point(49)) == {name: 0.1} and plan.target(Point(50)) == {name: 1.0}
    assert [plan.step(Point(s)).lr_factor for s in range(49, 55)] == [1, 0.25, 0.5, 0.75, 1, 1]
    assert plan.step(Point(50)).updates == plan.step(Point(50)).reset_moments == {name}
    assert not any(plan.step(Point(s)).updates for s in (49, 51, 60, 100))
    assert updated(config, [band([1.0] * 10, [3])], 50) == [list(range(10))]


def test_ac_dc_goes_to_and_fro_and_ends_sparse():
    changes = {"schedule": {"period_steps": 10, "every_steps": 10, "start": 0.1, "stop": 0.5}}
    config = rule("acdc", **changes)
    weights = [float(i) for i in range(10)]
    kept = [updated(config, [band(weights)], step)[0] for step in (0, 10, 20, 30, 40, 50)]
    every = list(range(10))
    assert kept == [every, [9], every, [9], every, [9]]
    plan = SparsityPlan(config)
    plan.begin({NAME: (1, 10)}, Horizon(100))
    assert [s for s in range(101) if plan.step(Point(s)).updates] == [0, 10, 20, 30, 40, 50]


def test_saliency_weighs_the_weight_by_its_gradient():
    found = rule("gmp", schedule=AT_ONCE | {"density": 0.5}).rules[0]
    config = SparsityConfig(rules=(replace(found, criterion="saliency"),))
    bands = [band([4.0, 3.0, 2.0, 1.0], None, [0.1, 0.3, -1.0, 1.0])]
    assert updated(config, bands, 10) == [[2, 3]]


def test_what_ends_pruned_is_masked_from_then_on():
    plan = SparsityPlan(RECIPES["ast"])
    plan.begin(EXPERTS, Horizon(1000))
    name = next(iter(EXPERTS))
    assert plan.flow(name, Point(999)).kind == "ste"
    assert plan.flow(name, Point(1000)) == Flow("masked")
    assert plan.step(Point(1000)).updates == frozenset(EXPERTS)


def test_the_first_rule_that_matches_has_the_matrix():
    first = RuleConfig(match=("*.up_proj.weight",), schedule=ScheduleConfig(density=0.5))
    second = RuleConfig(exclude=("*.layers.0.*",), schedule=ScheduleConfig(density=0.25))
    plan = SparsityPlan(SparsityConfig(rules=(first, second)))
    names = plan.begin(EXPERTS | {"model.norm.weight": (64,)}, Horizon(10))
    target = plan.target(Point(0))
    assert {n for n in names if ".up_" in n} == {n for n, d in target.items() if d == 0.5}
    assert {n for n in names if ".up_" not in n} == {
        n for n in EXPERTS if ".up_" not in n and "layers.1" in n
    }
    with pytest.raises(ValueError, match=r"sparsity.rules\[1\].match is .*no matrix that is left"):
        SparsityPlan(SparsityConfig(rules=(second, second))).begin(EXPERTS, Horizon(10))
