"""Whether a move pays: the seconds it saves until the next chance to move, against those it takes.

The one idea: a layer is as slow as its busiest rank, so what a placement saves is pairs on the
busiest ranks and, where bytes are the objective, those, each at the speed that this machine was
seen to have; a move costs the state of the experts that change ranks at the speed of the last move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from gossamer.parallel.placement.kernels import swap_down
from gossamer.parallel.placement.placement import Placement, from_ranks
from gossamer.parallel.placement.problem import Problem
from gossamer.parallel.placement.score import score


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of this machine, as measured."""

    pair_s: float
    """Seconds of a (token, slot) pair in the experts of a layer, forward and backward."""
    bytes_per_s: float
    """That a rank sends when all do."""
    move_s: float = 0.0
    """Of a move, however little moves."""

    def after(self, busiest_bytes: int, seconds: float, probe_bytes: int) -> Speed:
        """As known after a move: a large one tells the links' speed, a small one what it costs
        however little moves."""
        if busiest_bytes < probe_bytes:
            return replace(self, move_s=max(0.0, seconds - busiest_bytes / self.bytes_per_s))
        return replace(self, bytes_per_s=busiest_bytes / max(seconds - self.move_s, seconds / 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is expected of a move."""

    saved_s: float
    """Of each step."""
    cost_s: float
    """Of the move."""
    moved_experts: int
    """Over all layers."""
    busiest_bytes: int
    """That the rank which sends or receives most does."""

    def pays_within(self, steps: int) -> bool:
        """Strictly: where nothing is saved, nothing moves."""
        return self.saved_s * steps > self.cost_s


def forecast(
    problem: Problem,
    now: Placement,
    then: Placement,
    speed: Speed,
    pairs_per_step: float,
    expert_bytes: float,
    extra_s: float = 0.0,
) -> Forecast:
    """Of going from `now` to `then` if the coming steps are like those of `problem`.

    `pairs_per_step`: (token, slot) pairs of one expert group in a step, over all layers.
    `expert_bytes`: of what a rank holds of an expert (under ZeRO a share of its state). `extra_s`:
    what any move costs besides.
    """
    before, after = score(problem, now), score(problem, then)
    busiest = before.load_LR.max(1).sum() - after.load_LR.max(1).sum()
    saved_bytes = before.value - after.value if problem.objective == "bytes" else 0.0
    seen = busiest * speed.pair_s + saved_bytes / now.ranks / speed.bytes_per_s
    sent_R, received_R = np.zeros((2, now.ranks), np.int64)
    moves = now.rank_LE != then.rank_LE
    np.add.at(sent_R, now.rank_LE[moves], 1)
    np.add.at(received_R, then.rank_LE[moves], 1)
    busiest_bytes = int(max(sent_R.max(), received_R.max()) * expert_bytes)
    return Forecast(
        saved_s=float(seen) * pairs_per_step / max(1, int(problem.load_LE.sum())),
        cost_s=busiest_bytes / speed.bytes_per_s + (speed.move_s + extra_s) * bool(moves.any()),
        moved_experts=int(moves.sum()),
        busiest_bytes=busiest_bytes,
    )


def few_swaps(problem: Problem, now: Placement) -> Placement:
    """Better balance than `now` by as few swaps of experts as lower each layer's busiest rank."""
    rank_LE = now.rank_LE.copy()
    for load_E, rank_E in zip(problem.load_LE, rank_LE, strict=True):
        swap_down(np.ascontiguousarray(load_E), rank_E, now.ranks, 0)
    return from_ranks(rank_LE, now.ranks, now.layers, "swaps")


def most_worth(forecasts: Sequence[Forecast], steps: int) -> int | None:
    """Which of them saves most within so many steps, its cost taken off; None: none pays."""
    pay = [i for i, each in enumerate(forecasts) if each.pays_within(steps)]
    worth = {i: forecasts[i].saved_s * steps - forecasts[i].cost_s for i in pay}
    return max(pay, key=worth.__getitem__, default=None)
