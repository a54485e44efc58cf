"""A move is made when what it saves until the next chance is more than what it costs."""

from dataclasses import replace

import numpy as np
import pytest
from gossamer.parallel.placement import config
from gossamer.parallel.placement.placement import contiguous, from_ranks
from gossamer.parallel.placement.problem import (
    OBJECTIVES,
    SOURCES,
    Problem,
    Topology,
    balance_problem,
)
from gossamer.parallel.placement.solve import METHODS
from gossamer.parallel.placement.worth import Forecast, Speed, few_swaps, forecast, most_worth

NOW = contiguous(2, 4, 2)
BETTER = from_ranks([[0, 1, 0, 1], [0, 0, 1, 1]], 2)
"""Layer 0: the two busy experts are apart."""


def problem() -> Problem:
    loads = np.array([[30, 30, 10, 10], [20, 20, 20, 20]])
    return balance_problem(loads, Topology(nodes=1, ranks_per_node=2))


def test_a_forecast_by_hand():
    """60 -> 40 pairs on the busiest rank of layer 0; one expert each way of 100 bytes."""
    found = forecast(problem(), NOW, BETTER, Speed(pair_s=0.5, bytes_per_s=20.0), 160.0, 100.0)
    assert found == Forecast(saved_s=10.0, cost_s=5.0, moved_experts=2, busiest_bytes=100)
    anchored = forecast(
        problem(), NOW, BETTER, Speed(pair_s=0.5, bytes_per_s=20.0), 160.0, 100.0, extra_s=7.0
    )
    assert anchored.cost_s == 12.0
    # with half of the pairs a step, a step saves half
    half = forecast(problem(), NOW, BETTER, Speed(pair_s=0.5, bytes_per_s=20.0), 80.0, 100.0)
    assert (half.saved_s, half.cost_s) == (5.0, 5.0)


def test_moves_tell_what_moves_cost():
    speed = Speed(pair_s=1.0, bytes_per_s=100.0, move_s=1.0)
    assert speed.after(50, 4.5, 1000) == Speed(pair_s=1.0, bytes_per_s=100.0, move_s=4.0)
    assert speed.after(50, 0.1, 1000).move_s == 0.0
    assert speed.after(2000, 11.0, 1000) == Speed(pair_s=1.0, bytes_per_s=200.0, move_s=1.0)
    assert forecast(problem(), NOW, BETTER, speed, 1.0, 100.0).cost_s == 2.0
    assert forecast(problem(), NOW, NOW, speed, 1.0, 100.0).cost_s == 0.0


def test_it_pays_only_strictly_and_only_within_the_steps():
    move = Forecast(saved_s=1.0, cost_s=10.0, moved_experts=1, busiest_bytes=1)
    assert [move.pays_within(steps) for steps in (9, 10, 11)] == [False, False, True]
    nothing = forecast(problem(), NOW, NOW, Speed(pair_s=1.0, bytes_per_s=1.0), 160.0, 100.0)
    assert nothing == Forecast(saved_s=0.0, cost_s=0.0, moved_experts=0, busiest_bytes=0)
    assert not nothing.pays_within(10**9)
    back = forecast(problem(), BETTER, NOW, Speed(pair_s=1.0, bytes_per_s=1e12), 160.0, 100.0)
    assert back.saved_s < 0 and not back.pays_within(10**9)


def test_the_most_worth_of_several():
    cheap = Forecast(saved_s=1.0, cost_s=1.0, moved_experts=2, busiest_bytes=1)
    dear = Forecast(saved_s=1.5, cost_s=20.0, moved_experts=9, busiest_bytes=1)
    assert [most_worth([dear, cheap], steps) for steps in (1, 10, 30, 100)] == [None, 1, 1, 0]


def test_bytes_across_nodes_count_as_seconds():
    """Both ranks are nodes; the tokens of rank 1 use the experts of rank 0 and the reverse."""
    loads = np.array([[10, 10]])
    crossed = replace(
        balance_problem(loads, Topology(nodes=2, ranks_per_node=1)),
        source_LRE=np.array([[[0, 10], [10, 0]]]),
        objective="bytes",
        sources="seen",
        dispatch="one_level",
        row_bytes=3,
    )
    swap = from_ranks([[1, 0]], 2)
    found = forecast(crossed, contiguous(1, 2, 2), swap, Speed(pair_s=1.0, bytes_per_s=6.0), 20, 1)
    # 20 pairs x 4 trips x 3 bytes over 2 ranks, at 6 bytes a second
    assert found.saved_s == pytest.approx(20.0)


def test_few_swaps_move_less_and_never_make_it_worse():
    random = np.random.default_rng(0)
    loads = random.integers(0, 1000, (3, 16))
    case = balance_problem(loads, Topology(nodes=1, ranks_per_node=4))
    now = from_ranks([random.permutation(np.repeat(range(4), 4)) for _ in range(3)], 4)
    then = few_swaps(case, now)
    gain = forecast(case, now, then, Speed(pair_s=1.0, bytes_per_s=1.0), 1.0, 0.0)
    assert gain.saved_s > 0 and 0 < gain.moved_experts < 48
    assert few_swaps(case, then).moved(then) == 0


def test_the_config_knows_the_solvers_by_name():
    assert config.METHODS == tuple(METHODS)
    assert (config.OBJECTIVES, config.SOURCES) == (OBJECTIVES, SOURCES)
    with pytest.raises(ValueError, match="parallel.placement.method is luck; expected one of"):
        config.PlacementConfig(method="luck")
