"""What `gossamer bench sparsity` trains, and what it asks of the losses.

The one idea: an arm is a plan, and all arms get the same compute: as many steps as the dense arm's
FLOPs pay for at the plan's own densities. So a sparse arm sees more tokens, and the table says how
many.

FLOPs are those of the whole model, forward and backward, on a machine that skips masked weights, as
a run's metrics count them (trainer/sparsity/measure.py); what is under no mask costs what it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from gossamer.comm.names import expert_places
from gossamer.launch.sparsity_cli import model_shapes
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.sparsity.config import (
    DistributionConfig,
    FlowConfig,
    PatternConfig,
    RuleConfig,
    ScheduleConfig,
    SparsityConfig,
)
from gossamer.trainer.sparsity.measure import saved_flops
from gossamer.trainer.sparsity.method import Horizon, Point, Shapes
from gossamer.trainer.sparsity.plan import SparsityPlan
from gossamer.trainer.sparsity.recipes import RECIPES

HEADS, TOP_K = 2, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of model, data and training; the same for all arms."""

    dense_steps: int = 100
    """Of the dense arm; all others get its compute."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Each of initial weights, data order and masks; one learning rate for all, none tuned."""
    density: float = 0.2
    """At the end, of all but N:M."""
    every_steps: int = 5
    """Between mask changes."""
    lr: float = 4e-3
    rows: int = 8
    seq_len: int = 64
    hidden: int = 64
    layers: int = 2
    experts: int = 8
    """TOP_K for a token."""
    vocab_size: int = 512
    corpus_chars: int = 3_000_000
    heldout_rows: int = 128


QUICK = Sizes(
    dense_steps=20, seeds=(1,), every_steps=2, rows=2, corpus_chars=200_000, heldout_rows=8
)

QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("Is gradual pruning better than a static mask?", "journey", "static_erk"),
    ("Is 25 to 75 % of compute better than 5 to 50 %?", "journey", "early"),
    ("Is 25 to 75 % of compute better than 45 to 95 %?", "journey", "late"),
    ("Is one global ranking better than each matrix's own?", "journey", "journey_per_expert"),
    ("Is ERK better than uniform?", "static_erk", "static_uniform"),
    ("Is RigL better than a static mask?", "rigl", "static_erk"),
    ("Is SET better than a static mask?", "set", "static_erk"),
    ("Is GraNet better than RigL?", "granet", "rigl"),
    ("Is SR-STE better than STE, at 1:8?", "sr_ste", "ste"),
    ("Is a falling D(t) better than STE, at 1:8?", "pgf_mask", "ste"),
    ("Is sparse, with more tokens, better than dense?", "journey", "dense"),
)
"""(question, the arm it is about, the arm it is compared with)."""


def arms(sizes: Sizes) -> dict[str, SparsityConfig | None]:
    """Plans by name; None is dense. RigL's dense gradients are summed over one step."""
    density, every = sizes.density, sizes.every_steps
    found: dict[str, SparsityConfig | None] = {"dense": None}
    names = ("static_uniform", "static_erk", "set", "rigl", "granet", "journey")
    for name in (*names, "journey_per_expert"):
        (rule,) = RECIPES[name].rules
        schedule = replace(rule.schedule, density=density, every_steps=every)
        found[name] = _one(replace(rule, schedule=schedule))
    for name, start, stop in (("early", 0.05, 0.5), ("late", 0.45, 0.95)):
        schedule = ScheduleConfig(
            kind="geometric",
            density=density,
            unit="compute",
            start=start,
            stop=stop,
            every_steps=every,
        )
        distribution = DistributionConfig(kind="global")
        found[name] = _one(RuleConfig(schedule=schedule, distribution=distribution))
    for name in ("ste", "sr_ste", "pgf_mask"):
        (rule,) = RECIPES[name].rules
        found[name] = _one(replace(rule, pattern=PatternConfig(kind="n_m", n=1, m=8)))
    (strong,) = RECIPES["sr_ste"].rules
    flow = FlowConfig(kind="ste", decay=2e-2)
    found["sr_ste_strong"] = _one(
        replace(strong, pattern=PatternConfig(kind="n_m", n=1, m=8), flow=flow)
    )
    return found


def _one(rule: RuleConfig) -> SparsityConfig:
    return SparsityConfig(rules=(rule,))


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a dense step."""

    shapes: Shapes
    """Of all tensors of the model."""
    shares: dict[str, float]
    """Of the step's FLOPs, those of each matrix of the `*_proj`; experts share the tokens alike."""


@cache
def costs_of(sizes: Sizes) -> Costs:
    """As trainer/step/flops.py counts: 6 a weight and token, and attention."""
    shapes = model_shapes(ModelConfig(hf=hf_of(sizes)), sizes.vocab_size)
    experts = expert_places(shapes)
    used = {
        name: math.prod(shape) * (TOP_K / sizes.experts if name in experts else 1.0)
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    attention = sizes.layers * 2 * sizes.hidden * sizes.seq_len
    total = sum(used.values()) + attention
    return Costs(shapes, {n: part / total for n, part in used.items() if "_proj." in n})


def hf_of(sizes: Sizes) -> dict[str, int | float | str | bool | None]:
    """The model."""
    return {
        "model_type": "qwen3_moe",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": sizes.hidden // HEADS,
        "num_experts": sizes.experts,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "tie_word_embeddings": True,
    }


def steps_of(plan: SparsityConfig | None, sizes: Sizes) -> int:
    """Steps that cost what the dense ones do, as near as whole changes of masks allow."""
    dense_steps = sizes.dense_steps
    if plan is None:
        return dense_steps

    def off(total: int) -> float:
        return abs(sum(step_shares(plan, total, sizes)) - dense_steps)

    total = dense_steps
    for _ in range(5):
        total = round(dense_steps * total / sum(step_shares(plan, total, sizes)))
    near = plan.rules[0].schedule.every_steps
    return min(range(max(1, total - near), total + near + 1), key=off)


def step_shares(plan: SparsityConfig, total: int, sizes: Sizes) -> list[float]:
    """FLOPs of each step of an arm's one rule, as a share of a dense one's."""
    costs, method = costs_of(sizes), SparsityPlan(plan)
    names = method.begin(costs.shapes, Horizon(total))
    shares, masked = [], 0.0
    for step in range(total):
        now = method.step(Point(step))
        if now.updates:
            target = method.target(Point(step))
            masked = sum(costs.shares[name] * (1.0 - target[name]) for name in names)
        saved = saved_flops(method.flow(names[0], Point(step)), bool(now.scores))
        shares.append(1.0 - saved / 6.0 * masked)
    return shares
