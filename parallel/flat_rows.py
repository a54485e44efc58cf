"""Rows that an owner has changed, and what becomes of them on the ranks that hold copies or pieces.

The one idea: an owner alone decides on a row; the others are handed it over the fast links of the
replica, run by run in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from gossamer.parallel.engine import Owned, ReadRows
from gossamer.parallel.flat_layout import Run
from gossamer.parallel.flat_state import StateGroup, spread_run
from torch import Tensor


def write_owned(
    states: Iterable[StateGroup], read: ReadRows, master: Callable[[StateGroup], Tensor]
) -> None:
    """Overwrites masters, flat shards, with what their owners `read`. A collective call."""
    for state in states:
        shard = master(state)
        for run in state.layout.runs():
            values = None
            if run.owner == state.partition:
                rows = read(run.segment.name, run.row_start, run.row_stop).master
                values = rows.to(shard).reshape(-1)
            spread_run(state, run, values, shard)


def exchange_gradients(
    states: Iterable[StateGroup], exchange: Callable[[list[Owned]], None]
) -> None:
    """Has owners exchange their rows of the gradient in place. A collective call.

    For stage 0, where a state is one parameter and every rank of its group has its whole gradient.
    """
    owned: list[Owned] = []
    places: list[tuple[StateGroup, Run, Tensor, Owned | None]] = []
    for state in states:
        if state.parameter.grad is None:
            state.parameter.grad = torch.zeros_like(state.parameter)
        flat = state.parameter.grad.view(-1)
        for run in state.layout.runs():
            mine = None
            if run.owner == state.partition:
                segment, rows = run.segment, (run.row_start, run.row_stop)
                values = flat[run.start : run.stop].to("cpu", torch.float32, copy=True)
                shaped = values.view(rows[1] - rows[0], *segment.shape[1:])
                mine = Owned(segment.name, segment.shape, *rows, shaped, {})
                owned.append(mine)
            places.append((state, run, flat, mine))
    exchange(owned)
    for state, run, flat, mine in places:
        spread_run(state, run, None if mine is None else mine.master.to(flat).view(-1), flat)
