"""What every SparsityMethod keeps. Yours: GOSSAMER_SPARSITY_METHOD=my_package.mod:Name pytest <this
file>; it is built from GMP's config, whose rules it need not follow."""

import os
from dataclasses import replace

import pytest
import torch
from gossamer.trainer.import_path import resolve
from gossamer.trainer.sparsity.config import CRITERIA, SPARSITY_METHODS
from gossamer.trainer.sparsity.method import Horizon, Point
from gossamer.trainer.sparsity.recipes import RECIPES
from sparse_bands import ALONE, EXPERTS, as_ranks, joined, make_bands

NAMES = [*SPARSITY_METHODS, *filter(None, [os.environ.get("GOSSAMER_SPARSITY_METHOD")])]
SHAPES = EXPERTS | {"model.norm.weight": (64,)}
STEPS = range(0, 1001, 100)


@pytest.fixture(params=NAMES)
def build_method(request):
    def build(seed: int = 1):
        config = replace(RECIPES["gmp"], method=request.param, seed=seed)
        method = resolve(request.param, SPARSITY_METHODS, "sparsity.method")(config)
        return method, method.begin(SHAPES, Horizon(1000, 10_000))

    return build


def advance(method, bands, steps, reduce=ALONE):
    """Masks after the updates of these steps."""
    for step in steps:
        point = Point(step, 10 * step)
        due = method.step(point).updates
        mine = [band for band in bands if band.name in due]
        for band, mask in zip(mine, method.update(mine, point, reduce, due), strict=True):
            band.mask_RC = mask
    return [band.mask_RC for band in bands]


def test_it_governs_matrices_and_says_their_density(build_method):
    method, names = build_method()
    assert names == sorted(set(names)) and names
    assert all(len(SHAPES[name]) == 2 for name in names)
    for step in STEPS:
        target = method.target(Point(step, 10 * step))
        assert sorted(target) == names and all(0 < d <= 1 for d in target.values())


def test_masks_come_to_the_target_and_old_ones_stay_as_they_are(build_method):
    method, names = build_method()
    bands = [band for band in make_bands(SHAPES) if band.name in names]
    before = [band.mask_RC for band in bands]
    masks = advance(method, bands, STEPS)
    assert all(mask.dtype == torch.bool for mask in masks)
    assert all(mask.all() for mask in before)
    kept = sum(int(mask.sum()) for mask in masks)
    target = method.target(Point(1000, 10_000))
    sizes = {name: SHAPES[name][0] * SHAPES[name][1] for name in names}
    assert abs(kept - sum(target[n] * s for n, s in sizes.items())) <= len(names)


def test_masks_do_not_depend_on_who_owns_which_rows(build_method):
    method, names = build_method()
    shapes = {name: SHAPES[name] for name in names}
    bands = make_bands(shapes)
    whole = joined(bands, advance(method, bands, STEPS))

    def rank_of_three(rank, reduce):
        bands = make_bands(shapes, rank=rank, world=3)
        return bands, advance(build_method()[0], bands, STEPS, reduce)

    parts = as_ranks(3, rank_of_three)
    cut = joined([b for bands, _ in parts for b in bands], [m for _, masks in parts for m in masks])
    assert all(torch.equal(whole[name], cut[name]) for name in names)


def test_what_is_asked_for_is_all_that_is_chosen(build_method):
    """Replicas ask apart for matrices whose masked weights live, of which there may be none."""
    method, names = build_method()
    bands = [band for band in make_bands(SHAPES) if band.name in names]
    advance(method, bands, STEPS[:1])
    for step in STEPS:
        point = Point(step, 10 * step)
        assert method.update([], point, ALONE, frozenset()) == []
        due = method.step(point).updates
        mine = [band for band in bands if band.name in due]
        told = method.update(mine, point, ALONE, due)
        asked = method.update(mine, point, ALONE)
        assert all(torch.equal(a, b) for a, b in zip(told, asked, strict=True))


def test_a_resumed_method_goes_on_as_one_that_was_never_stopped(build_method):
    method, names = build_method()
    bands = [band for band in make_bands(SHAPES) if band.name in names]
    advance(method, bands, STEPS[:5])
    resumed, same = build_method()
    assert same == names
    held = [band.mask_RC for band in bands]
    went_on = advance(method, bands, STEPS[5:])
    for band, mask in zip(bands, held, strict=True):
        band.mask_RC = mask
    again = advance(resumed, bands, STEPS[5:])
    assert all(torch.equal(a, b) for a, b in zip(went_on, again, strict=True))


def test_flows_keep_shapes_and_live_weights(build_method):
    method, names = build_method()
    weight, mask = torch.randn(64, 96), torch.rand(64, 96) < 0.5
    for step in STEPS:
        flow = method.flow(names[0], Point(step, 10 * step))
        assert torch.equal(flow.forward(weight, mask)[mask], weight[mask])
        assert torch.equal(flow.gradient(weight, weight, mask)[mask], weight[mask])
    assert 0 < method.step(Point(0)).lr_factor <= 1


def test_an_unknown_method_is_refused_by_field():
    with pytest.raises(ValueError, match=r"sparsity.method is 'best'; expected one of \['plan'\]"):
        replace(RECIPES["gmp"], method="best")


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_score_every_element_of_whatever_rows(name):
    score = resolve(name, CRITERIA, "criterion")
    (whole,) = make_bands({"w": (64, 96)})
    found = score(whole, "draw")
    assert found.shape == (64, 96) and found.is_floating_point() and (found >= 0).all()
    assert found.unique().numel() > 10
    assert torch.equal(found, score(whole, "draw"))
