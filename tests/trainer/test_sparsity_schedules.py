"""Densities over time against closed forms, and against the models that were released."""

import math

import pytest
from gossamer.trainer.sparsity.config import ScheduleConfig
from gossamer.trainer.sparsity.method import Horizon, Point
from gossamer.trainer.sparsity.schedules import (
    Window,
    compute_density,
    density_at,
    position,
    window,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def journey(density: float, every_steps: int = 100) -> ScheduleConfig:
    return ScheduleConfig(
        kind="geometric",
        density=density,
        unit="compute",
        start=0.25,
        stop=0.75,
        every_steps=every_steps,
    )


def densities(schedule: ScheduleConfig, total: int) -> list[float]:
    """Density in force in each step; masks change every every_steps."""
    within = window(schedule, total)
    every = schedule.every_steps
    return [density_at(schedule, within, step // every * every) for step in range(total)]


@pytest.mark.parametrize(
    ("sparsity", "mean"), [(0.5, 0.693), (0.75, 0.460), (0.8, 0.399), (0.9, 0.248)]
)
def test_journeys_mean_density_in_closed_form(sparsity, mean):
    schedule = journey(1.0 - sparsity)
    assert compute_density(schedule) == pytest.approx(mean, abs=6e-4)
    inside = sparsity / -math.log(1.0 - sparsity)
    closed = 1.0 / (0.25 + 0.25 / (1.0 - sparsity) + 0.5 / inside)
    assert compute_density(schedule) == pytest.approx(closed)
    assert sum(densities(schedule, 50_000)) / 50_000 == pytest.approx(closed, abs=2e-3)


RELEASED = {
    0.2: (11_200, 0.223, 0.723, 1.02 / 1.14),
    0.4: (13_050, 0.192, 0.680, 0.7651),
    0.6: (16_375, 0.153, 0.617, 0.69 / 1.14),
}
"""Sparsity: steps (tokens of the card / 8M), start and stop as shares of them, mean density; two
of the cards give it as billions, to two digits, of 1.14 linear ones."""


@pytest.mark.parametrize("sparsity", RELEASED)
def test_journeys_window_is_that_of_the_released_models_to_one_event(sparsity):
    total, start, stop, _ = RELEASED[sparsity]
    within = window(journey(1.0 - sparsity), total)
    assert within.start == pytest.approx(start * total, abs=100)
    assert within.stop == pytest.approx(stop * total, abs=100)


def test_journeys_window_is_that_of_the_authors_config():
    """Their 50 % run prunes from step 12,500 to 47,200 of 72,200."""
    assert window(journey(0.5), 72_200) == Window(12_500, 47_200)


@pytest.mark.parametrize("sparsity", RELEASED)
def test_the_released_windows_have_the_mean_density_of_the_model_cards(sparsity):
    total, start, stop, mean = RELEASED[sparsity]
    schedule = ScheduleConfig(kind="geometric", density=1.0 - sparsity, start=start, stop=stop)
    found = sum(densities(schedule, total)) / total
    assert found == pytest.approx(mean, abs=1.5e-3 if sparsity == 0.4 else 5e-3)
    assert found == pytest.approx(compute_density(journey(1.0 - sparsity)), abs=2e-3)


@pytest.mark.parametrize(("kind", "mean"), [("linear", 0.774), ("polynomial", 0.726)])
def test_no_other_curve_has_the_mean_density_of_the_40_percent_model(kind, mean):
    total, start, stop, released = RELEASED[0.4]
    schedule = ScheduleConfig(kind=kind, density=0.6, start=start, stop=stop)
    found = sum(densities(schedule, total)) / total
    assert found == pytest.approx(mean, abs=2.5e-3) and abs(found - released) > 8e-3


def test_each_of_journeys_changes_takes_the_same_share_of_the_survivors():
    schedule = journey(0.5)
    within = window(schedule, 72_200)
    events = [density_at(schedule, within, x) for x in range(12_500, 47_300, 100)]
    n = len(events)
    assert n == (47_200 - 12_500) // 100 + 1
    for i, density in enumerate(events):
        assert density == pytest.approx(0.5 ** ((i + 1) / n), rel=1e-12)
    assert density_at(schedule, within, 12_400) == 1.0


def test_cubic_by_hand():
    """0 to 90 % sparse from step 100 to 500: half way s = .9 - .9 / 8."""
    schedule = ScheduleConfig(kind="polynomial", density=0.1, start=0.1, stop=0.5)
    within = window(schedule, 1000)
    found = [1 - density_at(schedule, within, x) for x in (0, 100, 200, 300, 500, 900)]
    assert found == pytest.approx([0, 0, 0.9 * (1 - 27 / 64), 0.9 * 7 / 8, 0.9, 0.9])


def test_the_other_kinds_by_hand():
    within = Window(100.0, 300.0)

    def at(schedule):
        return [density_at(schedule, within, x) for x in (0, 100, 200, 250, 300, 999)]

    half = ScheduleConfig(kind="linear", density=0.5)
    assert at(half) == pytest.approx([1, 1, 0.75, 0.625, 0.5, 0.5])
    assert at(ScheduleConfig(density=0.3)) == [0.3] * 6
    assert at(ScheduleConfig(kind="one_shot", density=0.3)) == [1, 0.3, 0.3, 0.3, 0.3, 0.3]
    levels = ScheduleConfig(kind="levels", density=0.2, levels=(0.8, 0.4, 0.3, 0.2))
    assert at(levels) == [1, 0.8, 0.3, 0.2, 0.2, 0.2]
    cyclic = ScheduleConfig(kind="cyclic", density=0.1, period_steps=50, every_steps=50)
    assert [density_at(cyclic, within, x) for x in (0, 100, 149, 150, 200, 250, 300, 999)] == [
        *(1, 0.1, 0.1, 1.0, 0.1, 1.0, 0.1, 0.1)
    ]


@pytest.mark.parametrize("kind", ["linear", "polynomial", "geometric"])
def test_a_density_is_reached_though_changes_do_not_divide_the_run(kind):
    """260 steps, a change every 100: the last is at 200."""
    for unit in ("steps", "tokens"):
        schedule = ScheduleConfig(kind=kind, density=0.2, unit=unit)
        within = window(schedule, 260)
        assert within == Window(0, 200) and density_at(schedule, within, 200) == 0.2


def test_a_prune_at_once_is_not_after_the_last_change():
    assert window(ScheduleConfig(kind="one_shot", density=0.2, start=1.0), 260).start == 200


@pytest.mark.parametrize(
    ("kind", "total", "changes"),
    [
        ("linear", 199, "1 change;"),
        ("polynomial", 99, "0 changes;"),
        ("geometric", 99, "1 change;"),
    ],
)
def test_a_fall_in_less_than_two_changes_is_refused(kind, total, changes):
    schedule = ScheduleConfig(kind=kind, density=0.2)
    with pytest.raises(ValueError, match=f"every_steps is 100, .* run of {total} .* in {changes}"):
        window(schedule, total)
    window(schedule, 200)


def test_a_cycle_that_never_comes_to_dense_is_refused():
    schedule = ScheduleConfig(kind="cyclic", density=0.1, start=0.1, stop=0.8, period_steps=1000)
    with pytest.raises(ValueError, match="period_steps is 1000, .* of 300 steps are 200; expected"):
        window(schedule, 300)
    window(schedule, 2000)


@settings(deadline=None)
@given(
    kind=st.sampled_from(["linear", "polynomial", "geometric"]),
    first=st.floats(0.5, 1.0),
    last=st.floats(0.05, 0.5),
    start=st.floats(0.0, 0.5),
    length=st.floats(0.1, 0.5),
)
def test_shares_of_compute_are_shares_of_the_sum_of_densities(kind, first, last, start, length):
    """Against the plain sum over 20,000 steps."""
    stop = min(start + length, 1.0)
    schedule = ScheduleConfig(
        kind=kind,
        density=last,
        initial_density=first,
        unit="compute",
        start=start,
        stop=stop,
        every_steps=1,
    )
    total = 20_000
    within = window(schedule, total)
    found = densities(schedule, total)
    compute = sum(found)
    assert sum(found[: int(within.start)]) / compute == pytest.approx(start, abs=1e-3)
    assert sum(found[: int(within.stop)]) / compute == pytest.approx(stop, abs=1e-3)
    assert compute / total == pytest.approx(compute_density(schedule), abs=1e-3)
    assert all(a >= b for a, b in zip(found, found[1:], strict=False))


def test_tokens_move_a_schedule_whatever_the_steps():
    schedule = ScheduleConfig(kind="linear", density=0.5, unit="tokens", every_steps=10)
    horizon = Horizon(1000, 4_000_000)
    within = window(schedule, horizon.total_steps)
    for step in (10, 900):
        x = position(schedule, Point(step, 1_000_000), horizon)
        assert density_at(schedule, within, x) == pytest.approx(0.875)
