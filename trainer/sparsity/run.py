"""A sparsity plan at work in a run: what a rank tells the method, and what becomes of its answers.

The one idea: a plan is asked the same questions at the same steps on every rank and on every
resume; masks and gradient sums live with the training state (parallel/masks.py), so all that is
kept here are a few counters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from gossamer.comm.names import expert_places
from gossamer.parallel.engine import Engine, Owned
from gossamer.parallel.gather import gather_texts
from gossamer.parallel.masks import MASK, WINDOW
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.import_path import resolve
from gossamer.trainer.model import MoEModel
from gossamer.trainer.sparsity.config import SPARSITY_METHODS
from gossamer.trainer.sparsity.flow import Flow
from gossamer.trainer.sparsity.measure import Measure
from gossamer.trainer.sparsity.method import (
    Band,
    Horizon,
    Names,
    Point,
    SparsityMethod,
    StepPlan,
)
from gossamer.trainer.update import UpdateResult
from torch import Tensor


class SparseRun:
    """One rank of it; every rank has one and makes the same calls."""

    def __init__(
        self, config: TrainConfig, model: MoEModel, engine: Engine, event: Callable[..., None]
    ) -> None:
        """`event` is called with the name and fields of what happened, on rank 0."""
        assert config.sparsity is not None
        self.engine, self._event = engine, event
        shapes = _all_shapes(model)
        self._last_step = config.max_steps
        steps = config.sparsity.total_steps or config.max_steps
        self.method: SparsityMethod = resolve(
            config.sparsity.method, SPARSITY_METHODS, "sparsity.method"
        )(config.sparsity)
        self.names = self.method.begin(shapes, Horizon(steps, config.sparsity.total_tokens))
        self.shapes = {name: shapes[name] for name in self.names}
        self.experts = expert_places(shapes)
        """(MoE layer, expert) of every expert's tensor."""
        self.shared: frozenset[str] = frozenset()
        """Matrices whose masks the rounds with other replicas decide: see rounds.py."""
        self.version = 0
        """The step after which masks last changed; where there are rounds, those they decide."""
        self._step = self._tokens = 0
        self._ended: Names = frozenset()
        """Matrices that are where the plan ends whatever the step, for none follows: see finish."""
        self._window: dict[str, int] = {}
        """Tokens that each expert's matrix saw since its window began; 0 for any matrix whose
        window has seen skipped steps alone."""
        self._plan, self._is_changed = StepPlan(), False
        self._flows: dict[str, Flow] = {}
        self._later: dict[str, Flow] = {}
        self._ending: Names = frozenset()
        """Matrices whose flow makes masked weights 0 as soon as masks that are due are chosen."""
        self._measure = Measure(self.shapes, self.experts, model.num_parameters()[0])

    # --- as the checkpoint has it ---------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON."""
        return {
            "step": self._step,
            "ended": sorted(self._ended),
            "tokens": self._tokens,
            "version": self.version,
            "window": self._window,
            "is_window_open": self.engine.masks.has_window,
            "measure": self._measure.state(),
            "alive": self._alive(),
        }

    def kinds(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        """None: the engine's rows hold the masks."""
        return {}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Before the engine reads the rows of a checkpoint. Raises ValueError for one without."""
        if state is None:
            raise ValueError(
                "the checkpoint was written without train.sparsity; expected one of this plan,"
                " whose masks it holds"
            )
        self._step, self._tokens, self.version = state["step"], state["tokens"], state["version"]
        self._ended = frozenset(state.get("ended", ()))
        self._window = dict(state["window"])
        self._measure.load(state["measure"])
        self._ask()
        self._is_changed = True
        if state["is_window_open"]:
            self.engine.masks.open_window()

    # --- the loop's steps -----------------------------------------------------------------------

    @property
    def lr_factor(self) -> float:
        """Of the next step's learning rate."""
        return self._plan.lr_factor

    def begin(self) -> None:
        """The first masks, before the first step."""
        self._ask()
        self.change()

    def updated(self, result: UpdateResult, step: int) -> dict[str, float]:
        """After an update, with which the run is at `step`; what is to be told of its FLOPs and
        densities. One that was skipped is a step of the plan like others."""
        told = {}
        self._count_window(result)
        if not result.skipped:
            told = self._measure.after_update(result, self._flows, self._plan.scores)
            self._tokens += result.tokens
        self._step, self._ended = step, frozenset()
        self._ask()
        self._is_changed = False
        return told

    def change(self) -> None:
        """Changes the masks that are due, once after each update. A collective call."""
        if not self._is_changed:
            self._renew(self.due - self.shared if self._step else self.due)

    def finish(self) -> bool:
        """No step follows: ends that the plan still has before it, as phases ended early, take
        place by the weights of now. Whether there were any. A collective call."""
        ending = frozenset(
            name
            for name, flow in self._flows.items()
            if flow.keeps_dense and not self.method.flow(name, self._end()).keeps_dense
        )
        if ending:
            self._ended = ending
            self._ask()
            self._renew(ending)
        return bool(ending)

    def follow(self) -> None:
        """Masks that are due and no affair of the rounds, from weights that these have brought. A
        collective call."""
        self._renew(self.due - self.shared)

    def install(
        self, step: int, names: frozenset[str], mask: Callable[[str, int], Tensor], version: int
    ) -> None:
        """The run is at `step`; masks of `names` are `mask(name, row_start)`, since step `version`.

        A collective call.
        """
        if step != self._step:
            self._step = step
            self._ask()
            self._is_changed = False
        if names:
            bands = self._bands(names)
            self._put(names, bands, [mask(band.name, band.row_start) for band in bands], version)

    @property
    def due(self) -> frozenset[str]:
        """Matrices whose masks change after this step."""
        return self._plan.updates

    def window_tokens(self, name: str) -> int:
        """That an expert's matrix saw in the window."""
        return self._window.get(name, 0)

    # --- parts ----------------------------------------------------------------------------------

    def _renew(self, names: frozenset[str]) -> None:
        self._is_changed = True
        if names:
            bands, point = self._bands(names), self._point()
            if self._ended:  # nobody asked for a window that ends here
                bands = [replace(band, gradient_RC=None, tokens=None) for band in bands]
                point = self._end()
            masks = self.method.update(bands, point, dist.all_reduce, names)
            self._put(names, bands, masks, self.version if self.shared else self._step)

    def _bands(self, names: frozenset[str]) -> list[Band]:
        """What this rank owns of `names`."""
        return [
            self._band(rows) for rows in self.engine.owned(with_moments=True) if rows.name in names
        ]

    def _put(
        self, names: frozenset[str], bands: list[Band], masks: list[Tensor], version: int
    ) -> None:
        self._measure.masks_changed(self._step, names, bands, masks)
        by_place = {(b.name, b.row_start): m for b, m in zip(bands, masks, strict=True)}
        self.engine.masks.set_masks(names, by_place, self._plan.reset_moments)
        if self._ending and self._ending <= names:
            self._ending = frozenset()
            self._set_flows()
        self._close_window(names)
        chosen, held = self._measure.mask_hash, self._measure.hash_of(self._bands(names))
        if chosen != held or not self.engine.masks.copies_agree():
            raise RuntimeError(
                f"after step {self._step} masks of hash {chosen} were chosen and those of all ranks"
                f" have {held}; expected the same on every rank: go on from the last checkpoint"
            )
        self.version = version
        targets = self.method.target(self._end() if self._ended else self._point())
        told = self._measure.masks_event(targets)
        self._event("masks", step=self._step, mask_version=self.version, **told)

    def _point(self, ahead: int = 0) -> Point:
        return Point(self._step + ahead, self._tokens)

    def _end(self) -> Point:
        """As if all phases had taken their steps."""
        return Point(max(self._step, self._last_step), self._tokens)

    def _ask(self) -> None:
        """What is due now, and how the next step goes."""
        self._plan, before = self.method.step(self._point()), self._flows
        self._flows, self._later = (
            {
                name: self.method.flow(name, self._end() if name in self._ended else point)
                for name in self.names
            }
            for point in (self._point(), self._point(ahead=1))
        )
        self._ending = frozenset(
            name
            for name in (self.due | self._ended) & before.keys()
            if before[name].keeps_dense and not self._flows[name].keeps_dense
        )
        self._set_flows({name: before[name] for name in self._ending})

    def _set_flows(self, instead: Mapping[str, Flow] | None = None) -> None:
        """Those of the next step; `instead`, of matrices that live on until masks are chosen."""
        now = {**self._flows, **(instead or {})}
        self.engine.masks.set_flows(now, self._later, self._plan.scores)

    def _count_window(self, result: UpdateResult) -> None:
        for name in self._plan.scores:
            if result.skipped:
                self._window.setdefault(name, 0)
            elif name in self.experts:
                layer, expert = self.experts[name]
                seen = result.expert_load[layer][expert]
                self._window[name] = self._window.get(name, 0) + seen
            else:
                self._window.pop(name, None)

    def _band(self, rows: Owned) -> Band:
        return Band(
            name=rows.name,
            shape=rows.shape,
            row_start=rows.row_start,
            weight_RC=rows.master,
            mask_RC=rows.moments[MASK],
            gradient_RC=rows.moments.get(WINDOW),
            momentum_RC=rows.moments.get("exp_avg"),
            tokens=self._window.get(rows.name),
        )

    def _alive(self) -> dict[str, float]:
        """Of which matrices the forward pass takes masked weights, and what share of them."""
        shares = {n: 1.0 if f.kind == "dense" else f.keep for n, f in self._flows.items()}
        return {name: share for name, share in shares.items() if share}

    def _close_window(self, names: frozenset[str]) -> None:
        for name in names:
            self._window.pop(name, None)
        self.engine.masks.clear_window(names, is_over=not (self._window or self._plan.scores))


def _all_shapes(model: MoEModel) -> dict[str, tuple[int, ...]]:
    """Every logical tensor of the replica, those of other ranks among them."""
    mine = {name: shape for logical in model.segments.values() for name, shape in logical}
    shapes: dict[str, tuple[int, ...]] = {}
    for text in gather_texts(json.dumps(mine)):
        shapes |= {name: tuple(shape) for name, shape in json.loads(text).items()}
    assert all(math.prod(shape) for shape in shapes.values())
    return shapes
