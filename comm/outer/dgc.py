"""Deep Gradient Compression: top-k of every step's gradient, between backward and step.

The one idea: what waits is not the gradient but the velocity that momentum would have made of it
(momentum correction), and the momentum of an element that was sent starts again from nothing
(momentum factor masking); so an element that waits long does not act as if it were new.
Lin et al., arXiv 1712.01887.

    u = mu u + g;  v = v + u;  send m = Q(TopK(v));  v = v - m;  u = 0 where m was sent
    the optimizer, without momentum of its own, steps with the mean of the messages

It wants fixed membership: every replica must take the same steps with the same means.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from gossamer.comm.codec.part import Rows
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.message import Sent
from gossamer.comm.outer.rule import Buffers, age, buffer_of, flat, give_back, top_k
from torch import Tensor


class Dgc:
    """Per-step top-k with momentum correction, clipping before it and densities that warm up."""

    def __init__(self, config: OuterConfig) -> None:
        self.on_gradients = True
        self.shared: Buffers = {}
        self.own: Buffers = {}
        self._constants = config.dgc
        self._absence = config.absence

    def send(self, delta: Rows, number: int) -> Sent | None:
        # beside what waits, under a name of its own: a checkpoint holds both
        momentum = buffer_of(replace(delta, name=f"momentum of {delta.name}"), self.own)
        waiting = buffer_of(delta, self.own)
        momentum.mul_(self._constants.momentum).add_(self._clipped(delta.values))
        waiting.add_(momentum)
        sent = top_k(delta, waiting, self.density_at(number))
        if sent is not None:
            flat(waiting)[sent.positions] -= sent.values
            flat(momentum)[sent.positions] = 0
        return sent

    def step(self, rows: Rows, mean: Tensor) -> None:
        rows.values.copy_(mean)

    def take_back(self, sent: Sent) -> None:
        give_back(sent, self.own, self._absence)

    def absent(self, rounds: int) -> None:
        age(self.own, self._absence, self._constants.momentum, rounds)

    def density_at(self, number: int) -> float:
        """The density of step `number`, from 0."""
        warmup, steps = self._constants.warmup_densities, self._constants.warmup_steps
        if steps and number < steps * len(warmup):
            return max(warmup[number // steps], self._constants.density)
        return self._constants.density

    def _clipped(self, gradient: Tensor) -> Tensor:
        limit = self._constants.max_norm
        norm = math.sqrt(float(np.square(flat(gradient), dtype=np.float64).sum())) if limit else 0
        return gradient * (limit / norm) if norm > limit > 0 else gradient
