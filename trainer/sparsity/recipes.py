"""The methods of the literature as plans, each a few lines. No torch here.

The one idea: nothing of a method is code; a rule says all of it, and so does the same tree in YAML
under `train.sparsity` (`gossamer sparsity methods NAME`).
"""

from __future__ import annotations

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


def _one(rule: RuleConfig) -> SparsityConfig:
    return SparsityConfig(rules=(rule,))


ERK = DistributionConfig(kind="erk")
GLOBAL = DistributionConfig(kind="global")
TO_10_PERCENT = ScheduleConfig(density=0.1)
EVERY_STEP = ScheduleConfig(every_steps=1)
TWO_OF_FOUR = PatternConfig(kind="n_m", n=2, m=4)
ONE_OF_EIGHT = PatternConfig(kind="n_m", n=1, m=8)
GRANET = RegrowConfig(criterion="gradient", share=0.5, final_share=0.005, stop=1.0, rounding="up")

RECIPES: dict[str, SparsityConfig] = {
    # Random pruning (2202.02643); ER and ERK are the same for matrices
    "static_uniform": _one(RuleConfig(schedule=TO_10_PERCENT)),
    "static_erk": _one(RuleConfig(schedule=TO_10_PERCENT, distribution=ERK)),
    # SPDF (2303.10464): 75 % sparse, then dense; variable SPDF: for the last 13 % of the steps. The
    # papers' dense parts have learning-rate curves of their own: a phase, see docs/sparsity.md
    "spdf": _one(
        RuleConfig(
            schedule=ScheduleConfig(density=0.25),
            end=EndConfig(kind="densify", at=0.8, rewarm=0.02),
        )
    ),
    "spdf_variable": _one(
        RuleConfig(
            schedule=TO_10_PERCENT,
            end=EndConfig(kind="densify", at=0.87, reset_moments=True, rewarm=0.013),
        )
    ),
    # The Journey Matters (2501.12486): 25 to 75 % of compute
    "journey": _one(
        RuleConfig(
            distribution=GLOBAL,
            schedule=ScheduleConfig(
                kind="geometric", density=0.2, unit="compute", start=0.25, stop=0.75
            ),
        )
    ),
    "journey_per_expert": _one(
        RuleConfig(
            schedule=ScheduleConfig(
                kind="geometric", density=0.2, unit="compute", start=0.25, stop=0.75
            ),
        )
    ),
    # Gradual magnitude, cubic (1710.01878)
    "gmp": _one(
        RuleConfig(
            schedule=ScheduleConfig(kind="polynomial", density=0.1, start=0.25, stop=0.75),
        )
    ),
    # SET (1707.04780), RigL (1911.11134)
    "set": _one(
        RuleConfig(
            schedule=TO_10_PERCENT, distribution=ERK, regrow=RegrowConfig(criterion="random")
        )
    ),
    "rigl": _one(
        RuleConfig(
            schedule=TO_10_PERCENT, distribution=ERK, regrow=RegrowConfig(criterion="gradient")
        )
    ),
    # GraNet (2106.10404), from dense and from 50 %
    "granet": _one(
        RuleConfig(
            schedule=ScheduleConfig(kind="polynomial", density=0.1, stop=0.3),
            distribution=GLOBAL,
            regrow=GRANET,
        )
    ),
    "granet_sparse": _one(
        RuleConfig(
            schedule=ScheduleConfig(kind="polynomial", initial_density=0.5, density=0.1, stop=0.3),
            distribution=GLOBAL,
            initial=InitialConfig(distribution=ERK),
            regrow=GRANET,
        )
    ),
    "granet_uniform": _one(
        RuleConfig(schedule=ScheduleConfig(kind="polynomial", density=0.1, stop=0.3), regrow=GRANET)
    ),
    # N:M from scratch by STE, and SR-STE (2102.04010)
    "ste": _one(RuleConfig(pattern=TWO_OF_FOUR, schedule=EVERY_STEP, flow=FlowConfig(kind="ste"))),
    "sr_ste": _one(
        RuleConfig(
            pattern=TWO_OF_FOUR, schedule=EVERY_STEP, flow=FlowConfig(kind="ste", decay=2e-4)
        )
    ),
    # Progressive Gradient Flow (2402.04744): mask decay, and both structure decays
    "pgf_mask": _one(
        RuleConfig(
            pattern=ONE_OF_EIGHT,
            schedule=ScheduleConfig(every_steps=1, stop=0.9),
            flow=FlowConfig(kind="soft"),
        )
    ),
    "pgf_stepwise": _one(
        RuleConfig(
            pattern=PatternConfig(kind="n_m", n=1, m=8, decay="stepwise"),
            schedule=ScheduleConfig(every_steps=1, start=0.1, stop=0.9),
            flow=FlowConfig(kind="ste"),
        )
    ),
    "pgf_geometric": _one(
        RuleConfig(
            pattern=PatternConfig(kind="n_m", n=1, m=8, decay="geometric"),
            schedule=ScheduleConfig(every_steps=1, start=0.1, stop=0.9),
            flow=FlowConfig(kind="ste"),
        )
    ),
    # AC/DC (2106.12379), AST (2407.20584), CAST (2509.25996, without weight scaling)
    "acdc": _one(
        RuleConfig(
            schedule=ScheduleConfig(
                kind="cyclic", density=0.1, start=0.1, stop=0.8, period_steps=1000
            ),
        )
    ),
    "ast": _one(
        RuleConfig(
            pattern=TWO_OF_FOUR,
            schedule=ScheduleConfig(every_steps=10),
            flow=FlowConfig(kind="ste", decay=6e-5, decay_place="ast", ramp=0.25),
            end=EndConfig(kind="prune"),
        )
    ),
    "cast": _one(
        RuleConfig(
            pattern=TWO_OF_FOUR,
            schedule=ScheduleConfig(every_steps=10),
            flow=FlowConfig(kind="dense", decay=4e-7, decay_place="adams", ramp=1.0),
            end=EndConfig(kind="prune"),
        )
    ),
}
