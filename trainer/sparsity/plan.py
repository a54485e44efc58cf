"""The built-in sparsity method: a list of rules.

The one idea: the first rule that matches a matrix has it, and rules know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from gossamer.trainer.sparsity.config import RuleConfig, SparsityConfig
from gossamer.trainer.sparsity.flow import Flow
from gossamer.trainer.sparsity.method import (
    Band,
    Horizon,
    Names,
    Point,
    Reduce,
    Shapes,
    StepPlan,
)
from gossamer.trainer.sparsity.rule import Rule
from torch import Tensor


class SparsityPlan:
    """See SparsityMethod."""

    def __init__(self, config: SparsityConfig) -> None:
        self._config = config
        self._rules: list[Rule] = []
        self._rule_of: dict[str, Rule] = {}

    def begin(self, shapes: Shapes, horizon: Horizon) -> list[str]:
        left = {name: tuple(shapes[name]) for name in sorted(shapes) if len(shapes[name]) == 2}
        for number, config in enumerate(self._config.rules):
            mine = {name: shape for name, shape in left.items() if _matches(config, name)}
            if not mine:
                raise ValueError(
                    f"sparsity.rules[{number}].match is {list(config.match)}, which is the name of"
                    " no matrix that is left for it; expected globs such as *.experts.*_proj.weight"
                )
            try:
                rule = Rule(config, mine, horizon, self._config.seed)
            except ValueError as error:
                raise ValueError(f"sparsity.rules[{number}]: {error}") from error
            self._rules.append(rule)
            self._rule_of |= dict.fromkeys(mine, rule)
            left = {name: shape for name, shape in left.items() if name not in mine}
        return sorted(self._rule_of)

    def step(self, point: Point) -> StepPlan:
        ended = [r for r in self._rules if point.step == r.end_step and r.config.end.reset_moments]
        factor = 1.0
        for rule in self._rules:
            done = point.step - rule.end_step
            if 0 <= done < rule.rewarm_steps:
                factor = min(factor, (done + 1) / rule.rewarm_steps)
        return StepPlan(
            updates=_names(rule for rule in self._rules if rule.is_due(point)),
            scores=_names(rule for rule in self._rules if rule.wants_gradient(point)),
            reset_moments=_names(ended),
            lr_factor=factor,
        )

    def target(self, point: Point) -> dict[str, float]:
        return {n: d for rule in self._rules for n, d in rule.target(point).items()}

    def update(
        self, bands: Sequence[Band], point: Point, reduce: Reduce, names: Names | None = None
    ) -> list[Tensor]:
        masks: list[Tensor] = [band.mask_RC for band in bands]
        asked = self.step(point).updates if names is None else names
        for rule in self._rules:
            if not asked.isdisjoint(rule.shapes):
                mine = [i for i, band in enumerate(bands) if self._rule_of[band.name] is rule]
                new = rule.update([bands[i] for i in mine], point, reduce)
                for i, mask in zip(mine, new, strict=True):
                    masks[i] = mask
        return masks

    def flow(self, name: str, point: Point) -> Flow:
        return self._rule_of[name].flow(point)


def _matches(config: RuleConfig, name: str) -> bool:
    is_excluded = any(fnmatchcase(name, glob) for glob in config.exclude)
    return not is_excluded and any(fnmatchcase(name, glob) for glob in config.match)


def _names(rules: Iterable[Rule]) -> frozenset[str]:
    return frozenset(name for rule in rules for name in rule.shapes)
