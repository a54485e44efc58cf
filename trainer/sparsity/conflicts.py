"""Choices of a sparsity rule that do not go together. No torch here.

The one idea: what would not do what its field says is refused where the config is read, so that a
rule that passes keeps its density whatever its axes are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.trainer.sparsity.config import RuleConfig


def check_together(rule: RuleConfig) -> None:
    """Raises ValueError for the first conflict."""
    for is_right, sentence in (*_of_pattern(rule), *_of_density(rule), *_of_change(rule)):
        if not is_right:
            raise ValueError(sentence)


def _of_pattern(rule: RuleConfig) -> Iterator[tuple[bool, str]]:
    schedule, pattern, dealt = rule.schedule, rule.pattern, rule.distribution
    share = pattern.n / pattern.m
    if pattern.kind == "n_m":
        yield (
            schedule.kind == "static" and dealt.kind == "uniform",
            "pattern.kind is n_m; expected schedule.kind static and distribution.kind uniform,"
            " for the pattern says how many are kept",
        )
        yield (
            schedule.density in (1.0, share),
            f"schedule.density is {schedule.density} with pattern.kind n_m; expected none, for"
            f" {pattern.n} of {pattern.m} are kept",
        )
    if pattern.kind == "n_m_floor":
        least = min(schedule.density, *schedule.levels, schedule.initial_density)
        yield (
            least >= share,
            f"schedule.density is {least} with pattern {pattern.n}:{pattern.m};"
            f" expected at least {share:g}",
        )
        first = rule.initial.distribution or dealt
        yield (
            all(each.kind != "erk" or each.floor >= share for each in (dealt, first)),
            f"distribution.kind is erk with pattern n_m_floor {pattern.n}:{pattern.m}; expected"
            f" distribution.floor at least {share:g}, for erk gives some matrices less",
        )


def _of_density(rule: RuleConfig) -> Iterator[tuple[bool, str]]:
    schedule, dealt = rule.schedule, rule.distribution
    yield (
        rule.pattern.kind == "n_m" or dealt.floor <= schedule.density <= dealt.ceiling,
        f"schedule.density is {schedule.density}; expected distribution.floor={dealt.floor} to"
        f" distribution.ceiling={dealt.ceiling}",
    )
    yield (
        dealt.ceiling == 1.0 or rule.initial.distribution is None,
        f"distribution.ceiling is {dealt.ceiling} with an initial.distribution; expected 1, for the"
        " first mask may lie above it",
    )
    levels = schedule.levels
    rises = any(a < b < 1.0 for a, b in zip(levels, levels[1:], strict=False))
    yield (
        rule.flow.kind != "masked" or not rises,
        f"schedule.levels is {levels} with flow.kind masked; expected none above the one before it,"
        " but 1, for masked weights come back all together or not at all",
    )
    yield (
        schedule.start == 0.0
        or schedule.kind != "static"
        or rule.pattern.kind == "n_m"
        or rule.flow.kind == "soft",
        f"schedule.start is {schedule.start} with kind static; expected 0, or kind one_shot, which"
        " is dense until then",
    )


def _of_change(rule: RuleConfig) -> Iterator[tuple[bool, str]]:
    regrow, every = rule.regrow, rule.schedule.every_steps
    is_masked = rule.flow.kind == "masked"
    yield (
        regrow.criterion == "none" or (is_masked and rule.pattern.kind not in ("n_m", "n_m_floor")),
        f"regrow.criterion is {regrow.criterion}; expected none, for only masked flows of"
        " unstructured or block patterns grow",
    )
    yield (
        regrow.window_steps <= every,
        f"regrow.window_steps is {regrow.window_steps}; expected at most"
        f" schedule.every_steps={every}, for a window lies between two changes",
    )
    yield (
        rule.end.kind != "prune" or not is_masked,
        "end.kind is prune with flow.kind masked; expected freeze, masked weights are 0",
    )
