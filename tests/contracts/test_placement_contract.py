"""Every placement method: a whole placement, a value that is counted, a bound that holds."""

import sys
from pathlib import Path

import numpy as np
import pytest
from gossamer.parallel.placement.costs import load_limits
from gossamer.parallel.placement.problem import DISPATCHES, balance_problem
from gossamer.parallel.placement.score import score
from gossamer.parallel.placement.solve import METHODS, place

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from placement_cases import every, random_problem  # noqa: E402

LOOKS_AT_BYTES = ("ilp", "local", "auto")


@pytest.mark.parametrize("dispatch", [None, *DISPATCHES])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_answers_with_a_value_and_a_bound(method, dispatch):
    more = {"objective": "bytes", "dispatch": dispatch} if dispatch else {}
    problem = random_problem(7, (4, 2, 1), layers=2, **more)
    placed = place(problem, method, time_limit_s=0.4)
    assert placed.method == method and placed.proof and placed.objective == problem.name
    assert placed.value == score(problem, placed).value
    tried = list(every(problem))
    best = min(value for value, _ in tried)
    assert 0 <= placed.gap <= 1 and best <= placed.value
    if method in LOOKS_AT_BYTES and dispatch:
        limit_L = load_limits(problem, np.min([busiest for _, busiest in tried], axis=0))
        assert (score(problem, placed).load_LR.max(1) <= limit_L).all()
    else:
        assert placed.bound <= best


@pytest.mark.parametrize("method", METHODS)
def test_counters_alone_are_enough_for_balance(method):
    problem = balance_problem(np.array([[5, 1, 1, 1]]), random_problem(1, (4, 2, 1)).topology, (3,))
    placed = place(problem, method, time_limit_s=0.4)
    assert placed.layers == (3,) and placed.bound == 6
    assert method == "contiguous" or placed.value == 6


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="placement method 'magic': expected one of contiguous,"):
        place(random_problem(1, (4, 2, 1)), "magic")
