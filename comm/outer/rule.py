"""Outer rules: what a replica sends after its own steps, and what the mean of all that does.

The one idea: a rule sees rows of one tensor at a time, under a key that is theirs alone, and writes
in place. What it sends leaves its buffers by exactly the values that the receivers decode.

`delta` = shared weights before the steps - own weights after them: old minus new (for `dgc` it is
the gradient), so every rule steps against it. All arithmetic is float32 on the CPU, products
rounded before they are added, so that the same messages make the same bits everywhere.

averaging    McMahan et al. 2017       w -= lr mean
diloco       arXiv 2311.08105          b = mu b + mean;  w -= lr (mean + mu b)
sparseloco   arXiv 2508.15706          a = beta e + delta;  send m = Q(TopK(a));  e = a - m;
                                       w -= lr mean(m)
dgc          arXiv 1712.01887, outer/dgc.py
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import numpy as np
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.message import Sent, send_dense, send_sparse
from gossamer.comm.outer.sparse import BLOCK
from torch import Tensor, contiguous_format, zeros_like

OUTER_RULES = {
    "averaging": "gossamer.comm.outer.rule:Averaging",
    "diloco": "gossamer.comm.outer.rule:Diloco",
    "sparseloco": "gossamer.comm.outer.rule:SparseLoco",
    "dgc": "gossamer.comm.outer.dgc:Dgc",
}

Key = tuple[str, int]
"""(tensor name, first row) of rows that one rank holds; a second buffer of theirs has words and a
blank before the name."""
Buffers = dict[Key, Tensor]
"""float32 on the CPU, each shaped as its rows."""


class OuterRule(Protocol):
    """The rule of one rank of one replica; made as `cls(config)` from an OuterConfig."""

    on_gradients: bool
    """False: rows are weights, and a delta is what some steps changed of them. True: rows are the
    gradients of a step that is to come."""
    shared: Buffers
    """State that is a function of the settled rounds, alike in all replicas: goes into anchors."""
    own: Buffers
    """State of this replica alone: goes into its checkpoints."""

    def send(self, delta: Rows, number: int) -> Sent | None:
        """What to send of these rows in round `number`; None: nothing."""
        ...

    def step(self, rows: Rows, mean: Tensor) -> None:
        """One outer step in place: on weights; for `dgc` on the gradient to go on with."""
        ...

    def take_back(self, sent: Sent) -> None:
        """What never counted returns to the buffers, if the rule has any."""
        ...

    def absent(self, rounds: int) -> None:
        """This replica missed so many rounds: its buffers are old."""
        ...


def build_rule(config: OuterConfig) -> OuterRule:
    """The rule that `config.rule` names. Raises ValueError for a name that is neither
    registered nor an import path."""
    path = OUTER_RULES.get(config.rule, config.rule)
    module, mark, attribute = path.partition(":")
    if not mark:
        names = ", ".join(OUTER_RULES)
        raise ValueError(f"rule must be one of {names} or package.module:Name, not {config.rule!r}")
    return getattr(import_module(module), attribute)(config)


class Averaging:
    """The weights go by `averaging.lr` of the way to the mean of the replicas' weights."""

    def __init__(self, config: OuterConfig) -> None:
        self.on_gradients = False
        self.shared: Buffers = {}
        self.own: Buffers = {}
        self._lr = config.averaging.lr

    def send(self, delta: Rows, number: int) -> Sent | None:
        return whole(delta)

    def step(self, rows: Rows, mean: Tensor) -> None:
        rows.values.sub_(mean * self._lr)

    def take_back(self, sent: Sent) -> None:
        pass  # no buffer: the work of that round is lost

    def absent(self, rounds: int) -> None:
        pass


class Diloco:
    """Nesterov momentum on the mean, as torch.optim.SGD(nesterov=True) has it."""

    def __init__(self, config: OuterConfig) -> None:
        self.on_gradients = False
        self.shared: Buffers = {}
        self.own: Buffers = {}
        self._lr = config.diloco.lr
        self._momentum = config.diloco.momentum

    def send(self, delta: Rows, number: int) -> Sent | None:
        return whole(delta)

    def step(self, rows: Rows, mean: Tensor) -> None:
        velocity = buffer_of(rows, self.shared)
        velocity.mul_(self._momentum).add_(mean)
        rows.values.sub_((velocity * self._momentum).add_(mean) * self._lr)

    def take_back(self, sent: Sent) -> None:
        pass  # as with averaging

    def absent(self, rounds: int) -> None:
        pass


class SparseLoco:
    """Top-k in two bits with error feedback. It needs no outer momentum: what waits in the error
    buffers works like one."""

    def __init__(self, config: OuterConfig) -> None:
        self.on_gradients = False
        self.shared: Buffers = {}
        self.own: Buffers = {}
        self._constants = config.sparseloco
        self._absence = config.absence

    def send(self, delta: Rows, number: int) -> Sent | None:
        if not self._constants.error_feedback:
            return top_k(delta, delta.values, self._constants.density)
        error = buffer_of(delta, self.own)
        error.mul_(self._constants.error_decay).add_(delta.values)
        sent = top_k(delta, error, self._constants.density)
        if sent is not None:
            flat(error)[sent.positions] -= sent.values
        return sent

    def step(self, rows: Rows, mean: Tensor) -> None:
        rows.values.sub_(mean * self._constants.lr)

    def take_back(self, sent: Sent) -> None:
        give_back(sent, self.own, self._absence)

    def absent(self, rounds: int) -> None:
        age(self.own, self._absence, self._constants.error_decay, rounds)


def whole(rows: Rows) -> Sent | None:
    """All of the rows in float32; None of zeros."""
    if not rows.values.any():
        return None
    return send_dense(rows.name, rows.shape, rows.row_start, rows.values)


def top_k(rows: Rows, values: Tensor, density: float) -> Sent | None:
    """The greatest share `density` of each block of `values`, at least one; None of zeros."""
    kept = max(1, round(density * BLOCK))
    return send_sparse(rows.name, rows.shape, rows.row_start, values, kept)


def buffer_of(rows: Rows, buffers: Buffers) -> Tensor:
    """The buffer of these rows; zeros before the first use."""
    key = rows.name, rows.row_start
    if key not in buffers:
        buffers[key] = zeros_like(rows.values, memory_format=contiguous_format)
    return buffers[key]


def flat(values: Tensor) -> np.ndarray:
    """All elements in one axis, a view."""
    return values.view(-1).numpy()


def give_back(sent: Sent, buffers: Buffers, absence: str) -> None:
    """Adds what never counted to its buffer, unless what is late is dropped."""
    key = sent.run.name, sent.run.row_start
    if absence != "drop" and key in buffers and sent.positions is not None:
        flat(buffers[key])[sent.positions] += sent.values


def age(buffers: Buffers, absence: str, decay: float, rounds: int) -> None:
    """What the policy on absence makes of buffers that missed so many rounds."""
    if absence == "drop":
        buffers.clear()
    if absence == "decay":
        for each in buffers.values():
            each.mul_(decay**rounds)
