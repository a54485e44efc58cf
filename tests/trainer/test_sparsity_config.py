"""What a plan refuses, in one sentence that names the field; and YAML that says a recipe."""

import json
from dataclasses import asdict, replace

import pytest
from gossamer.launch.recipe import build_config
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
from gossamer.trainer.sparsity.recipes import RECIPES


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: DistributionConfig(kind="even"), "distribution.kind is 'even'; expected one of"),
        (lambda: DistributionConfig(floor=0.5, ceiling=0.4), "distribution.ceiling is 0.4"),
        (lambda: ScheduleConfig(density=0.0), "schedule.density is 0.0; expected above 0"),
        (lambda: ScheduleConfig(start=0.8, stop=0.2), "schedule.stop is 0.2; expected start=0.8"),
        (lambda: ScheduleConfig(every_steps=0), "schedule.every_steps is 0"),
        (lambda: ScheduleConfig(unit="compute"), "schedule.unit is compute with kind static"),
        (lambda: ScheduleConfig(initial_density=0.5), "initial_density is 0.5 with kind static"),
        (lambda: ScheduleConfig(kind="levels", levels=(0.5,)), "schedule.levels is"),
        (lambda: ScheduleConfig(kind="cyclic"), "schedule.period_steps is 0 with kind cyclic"),
        (lambda: ScheduleConfig(kind="cyclic", period_steps=150), "a multiple of every_steps=100"),
        (lambda: InitialConfig(criterion="gradient"), "initial.criterion is gradient"),
        (lambda: RegrowConfig(share=1.5), "regrow.share is 1.5; expected a number from 0 to 1"),
        (lambda: RegrowConfig(criterion="steep"), "regrow.criterion is 'steep'; expected one of"),
        (lambda: RegrowConfig(criterion="momentum"), "['gradient', 'none', 'random'] or"),
        (lambda: PatternConfig(n=4, m=4), "pattern.n is 4; expected 1 to below m=4"),
        (lambda: PatternConfig(decay="stepwise"), "decay is stepwise with kind unstructured"),
        (
            lambda: PatternConfig(kind="n_m", n=2, m=6, decay="stepwise"),
            "pattern is 2:6 with decay stepwise; expected m/n a power of 2",
        ),
        (
            lambda: PatternConfig(block_rows=48),
            "pattern.block_rows is 48; expected a divisor of 64",
        ),
        (lambda: FlowConfig(decay=0.1), "flow.decay is 0.1 with kind masked"),
        (lambda: EndConfig(rewarm=0.5), "with kind freeze; expected densify"),
        (
            lambda: RuleConfig(
                pattern=PatternConfig(kind="n_m"), regrow=RegrowConfig(criterion="random")
            ),
            "regrow.criterion is random; expected none",
        ),
        (
            lambda: RuleConfig(
                pattern=PatternConfig(kind="n_m"), distribution=DistributionConfig(kind="erk")
            ),
            "pattern.kind is n_m; expected schedule.kind static and distribution.kind uniform",
        ),
        (
            lambda: RuleConfig(
                distribution=DistributionConfig(floor=0.2), schedule=ScheduleConfig(density=0.1)
            ),
            "schedule.density is 0.1; expected distribution.floor=0.2 to",
        ),
        (
            lambda: RuleConfig(
                pattern=PatternConfig(kind="n_m_floor"), schedule=ScheduleConfig(density=0.3)
            ),
            "schedule.density is 0.3 with pattern 2:4; expected at least 0.5",
        ),
        (
            lambda: RuleConfig(
                pattern=PatternConfig(kind="n_m_floor"),
                schedule=ScheduleConfig(kind="levels", density=0.6, levels=(0.4, 0.6)),
            ),
            "schedule.density is 0.4 with pattern 2:4; expected at least 0.5",
        ),
        (
            lambda: RuleConfig(
                pattern=PatternConfig(kind="n_m_floor"),
                distribution=DistributionConfig(kind="erk", floor=0.4),
                schedule=ScheduleConfig(density=0.6),
            ),
            "n_m_floor 2:4; expected distribution.floor at least 0.5",
        ),
        (
            lambda: RuleConfig(
                pattern=PatternConfig(kind="n_m"), schedule=ScheduleConfig(density=0.3)
            ),
            "schedule.density is 0.3 with pattern.kind n_m; expected none, for 2 of 4 are kept",
        ),
        (
            lambda: RuleConfig(
                schedule=ScheduleConfig(every_steps=5), regrow=RegrowConfig(window_steps=20)
            ),
            "regrow.window_steps is 20; expected at most schedule.every_steps=5",
        ),
        (
            lambda: RuleConfig(
                schedule=ScheduleConfig(kind="levels", density=0.8, levels=(1.0, 0.5, 0.8))
            ),
            "schedule.levels is (1.0, 0.5, 0.8) with flow.kind masked; expected none above",
        ),
        (
            lambda: RuleConfig(schedule=ScheduleConfig(density=0.3, start=0.2)),
            "schedule.start is 0.2 with kind static; expected 0, or kind one_shot",
        ),
        (
            lambda: RuleConfig(end=EndConfig(kind="prune")),
            "end.kind is prune with flow.kind masked",
        ),
        (lambda: SparsityConfig(), "sparsity.rules is empty"),
        (
            lambda: SparsityConfig(rules=(RuleConfig(schedule=ScheduleConfig(unit="tokens")),)),
            "sparsity.total_tokens is missing",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_by_field(build, sentence):
    with pytest.raises(ValueError) as caught:
        build()
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_plain_trees(name):
    """As the run's resolved config is written, and read again."""
    written = json.loads(json.dumps(asdict(RECIPES[name])))
    assert build_config(SparsityConfig, written, "") == RECIPES[name]


def test_yaml_says_journey_in_a_few_lines():
    schedule = {"kind": "geometric", "density": 0.2, "unit": "compute", "start": 0.25, "stop": 0.75}
    plan = {"rules": [{"distribution": {"kind": "global"}, "schedule": schedule}]}
    assert build_config(SparsityConfig, plan, "") == RECIPES["journey"]
    with pytest.raises(ValueError, match=r"rules\[0\].schedul; did you mean schedule\?"):
        build_config(SparsityConfig, {"rules": [{"schedul": schedule}]}, "")


def test_an_outsiders_names_are_import_paths():
    rule = RuleConfig(criterion="my_package.scores:fisher")
    assert replace(rule, regrow=RegrowConfig(criterion="my_package.scores:fisher"))
    assert SparsityConfig(method="my_package.plan:Mine").rules == ()
