"""Any rule that the config lets pass keeps its density at every step, whatever the axes."""

import torch
from gossamer.trainer.sparsity.config import (
    DistributionConfig,
    EndConfig,
    FlowConfig,
    InitialConfig,
    PatternConfig,
    RegrowConfig,
    RuleConfig,
    ScheduleConfig,
    SparsityConfig,
)
from gossamer.trainer.sparsity.method import Band, Horizon, Point
from gossamer.trainer.sparsity.plan import SparsityPlan
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_bands import ALONE

SHAPES = {
    f"layers.{layer}.experts.{expert}.{name}_proj.weight": shape
    for layer in range(2)
    for expert in range(2)
    for name, shape in (("up", (8, 16)), ("down", (16, 8)), ("tiny", (2, 8)))
}
SCORES = ("magnitude", "random", "gradient", "saliency", "momentum")
KINDS = ("uniform", "erk", "layer", "global")
STEPS = 40


@st.composite
def rules(draw) -> RuleConfig:
    density = draw(st.sampled_from([0.1, 0.25, 0.37, 0.8, 0.89]))
    falls = draw(st.sampled_from(["linear", "polynomial", "geometric"]))
    unit = draw(st.sampled_from(["steps", "tokens", "compute"]))
    start = draw(st.floats(0.0, 0.3))
    schedule = draw(
        st.sampled_from(
            [
                ScheduleConfig(density=density, every_steps=5),
                ScheduleConfig(kind="one_shot", density=density, start=start, every_steps=5),
                ScheduleConfig(
                    kind="levels",
                    density=density,
                    levels=(0.95, density),
                    start=start,
                    stop=0.85,
                    every_steps=5,
                ),
                ScheduleConfig(
                    kind=falls, density=density, unit=unit, start=start, stop=0.85, every_steps=5
                ),
                ScheduleConfig(
                    kind="cyclic",
                    density=density,
                    start=start,
                    stop=0.85,
                    period_steps=10,
                    every_steps=5,
                ),
            ]
        )
    )
    first = draw(st.sampled_from([None, DistributionConfig(kind="erk"), DistributionConfig()]))
    ceiling = 1.0 if first else draw(st.sampled_from([1.0, 0.9]))
    flow = draw(st.sampled_from(["masked", "masked", "masked", "ste", "soft", "dense"]))
    masked = flow == "masked"
    return RuleConfig(
        distribution=DistributionConfig(
            kind=draw(st.sampled_from(KINDS)), floor=0.05, ceiling=ceiling
        ),
        initial=InitialConfig(distribution=first),
        schedule=schedule,
        criterion=draw(st.sampled_from(SCORES)),
        regrow=RegrowConfig(
            criterion=draw(st.sampled_from(["none", "random", "gradient"])) if masked else "none",
            share=draw(st.floats(0.0, 1.0)),
            rounding=draw(st.sampled_from(["up", "down"])),
        ),
        pattern=PatternConfig(
            kind="block", block_rows=2, block_columns=draw(st.sampled_from([1, 4]))
        )
        if draw(st.booleans())
        else PatternConfig(),
        flow=FlowConfig(kind=flow),
        end=EndConfig(
            kind=draw(st.sampled_from(["densify", "freeze"])), at=draw(st.sampled_from([0.5, 0.9]))
        ),
    )


@settings(deadline=None, max_examples=60)
@given(rule=rules(), seed=st.integers(0, 99))
def test_every_update_comes_to_the_target(rule, seed):
    plan = SparsityPlan(SparsityConfig(rules=(rule,), total_tokens=1000))
    plan.begin(SHAPES, Horizon(STEPS, 1000))
    generator = torch.Generator().manual_seed(seed)

    def noise(shape):
        return torch.randn(shape, generator=generator)

    bands = [
        Band(n, s, 0, noise(s), torch.ones(s, dtype=torch.bool), tokens=seed % 2)
        for n, s in SHAPES.items()
    ]

    def is_kept(densities: dict[str, float]) -> bool:
        """To one block a layer, where each layer's budget is rounded by itself."""
        wanted = sum(densities[band.name] * band.mask_RC.numel() for band in bands)
        kept = sum(int(band.mask_RC.sum()) for band in bands)
        block = rule.pattern.block_rows * rule.pattern.block_columns
        return abs(kept - wanted) <= 2 * block

    for step in range(STEPS + 1):
        point = Point(step, 25 * step)
        if plan.step(point).updates:
            for band, mask in zip(bands, plan.update(bands, point, ALONE), strict=True):
                band.mask_RC = mask
                band.weight_RC = band.weight_RC + noise(band.shape)
                if not plan.flow(band.name, point).keeps_dense:
                    band.weight_RC = band.weight_RC.where(mask, 0.0)
            assert is_kept(plan.target(point))
        for band in bands:  # there are none before the first step
            band.gradient_RC, band.momentum_RC = noise(band.shape), noise(band.shape)
    assert is_kept(plan.target(Point(STEPS, 25 * STEPS)))
    if rule.end.kind == "densify" or rule.end.at > rule.schedule.stop:
        last = 1.0 if rule.end.kind == "densify" else rule.schedule.density
        assert is_kept(dict.fromkeys(SHAPES, last))
