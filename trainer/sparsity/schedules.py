"""Density over the run.

The one idea: every schedule is a function of a position x in steps (tokens are scaled to steps),
and a window that is given in shares of compute becomes one in steps in closed form, from the mean
density of the curve.

Cubic: Zhu and Gupta, 2017 (arXiv 1710.01878). Geometric, 25 to 75 % of compute: Jin et al., 2025
(arXiv 2501.12486). Dense and sparse in turn: AC/DC, Peste et al., 2021 (arXiv 2106.12379).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gossamer.trainer.sparsity.config import FALLING, ScheduleConfig

if TYPE_CHECKING:  # they bring torch, and a config asks for windows too
    from gossamer.trainer.sparsity.method import Horizon, Point


@dataclass(frozen=True, slots=True)
class Window:
    """The steps between which the density falls."""

    start: float
    stop: float


def position(schedule: ScheduleConfig, point: Point, horizon: Horizon) -> float:
    """Where `point` lies on the schedule's axis, in steps."""
    if schedule.unit != "tokens":
        return float(point.step)
    assert horizon.total_tokens is not None
    return point.tokens * horizon.total_steps / horizon.total_tokens


def window(schedule: ScheduleConfig, total_steps: int) -> Window:
    """Start and stop in steps; multiples of every_steps, where steps are what is counted, and never
    after the last change of masks.

    Raises ValueError where a density that falls gradually would fall in less than two changes, and
    where one that goes to and fro would only fall.
    """
    start, stop, every = schedule.start, schedule.stop, schedule.every_steps
    if schedule.unit == "compute":
        mean = compute_density(schedule)
        start, stop = (
            mean * start / schedule.initial_density,
            1.0 - mean * (1.0 - stop) / schedule.density,
        )
    ends = [start * total_steps, stop * total_steps]
    if schedule.unit != "tokens":
        ends = [every * round(end / every) for end in ends]
    first, last = (min(end, total_steps // every * every) for end in ends)
    changes = int(last - first) // every + (schedule.kind == "geometric")
    falls = schedule.kind in FALLING and schedule.initial_density > schedule.density
    if falls and changes < 2:
        raise ValueError(
            f"schedule.every_steps is {every}, so that the density of a run of {total_steps} steps"
            f" falls in {changes} change{'s' * (changes != 1)}; expected fewer steps between"
            " changes, for at least 2 of them"
        )
    if schedule.kind == "cyclic" and last - first <= schedule.period_steps:
        raise ValueError(
            f"schedule.period_steps is {schedule.period_steps}, and start to stop of a run of"
            f" {total_steps} steps are {last - first:g}; expected less, to be dense once"
        )
    return Window(first, last)


def window_density(schedule: ScheduleConfig) -> float:
    """Mean density between start and stop of a linear, polynomial or geometric schedule."""
    first, last = schedule.initial_density, schedule.density
    if first == last:
        return last
    if schedule.kind == "geometric":
        return (first - last) / math.log(first / last)
    power = schedule.power if schedule.kind == "polynomial" else 1.0
    return last + (first - last) / (power + 1.0)


def compute_density(schedule: ScheduleConfig) -> float:
    """Mean density of the whole run where start and stop are shares of compute."""
    start, stop = schedule.start, schedule.stop
    steps_a_compute = (
        start / schedule.initial_density
        + (stop - start) / window_density(schedule)
        + (1.0 - stop) / schedule.density
    )
    return 1.0 / steps_a_compute


def density_at(schedule: ScheduleConfig, within: Window, x: float) -> float:
    """Target density once `x` steps are done."""
    kind, last = schedule.kind, schedule.density
    if kind == "static":
        return last
    if x < within.start:
        return schedule.initial_density
    if kind == "one_shot" or x >= within.stop:
        return last
    if kind == "cyclic":
        return last if (x - within.start) // schedule.period_steps % 2 == 0 else 1.0
    share = (x - within.start) / (within.stop - within.start)
    if kind == "levels":
        return schedule.levels[int(share * len(schedule.levels))]
    first = schedule.initial_density
    if kind == "geometric":
        # n changes take equal shares of the survivors, the first of them at start
        every = schedule.every_steps
        share = (x - within.start + every) / (within.stop - within.start + every)
        return first * (last / first) ** share
    power = schedule.power if kind == "polynomial" else 1.0
    return min(first, last + (first - last) * (1.0 - share) ** power)
