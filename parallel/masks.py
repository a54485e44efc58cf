"""Masks on the training state: which weights live, held beside the masters in the same flat shards.

The one idea: a mask is one more buffer of a shard, so it travels with the masters into rows,
checkpoints and re-placement. The optimizer's parameter holds what the forward pass sees; where
masked weights live on, the true weights lie in a buffer of their own and are there for the step
alone. So no flow costs a further gather or a change to the model.

What a masked weight does (its flow) is told from outside. Where it is to be 0, so are its gradient
and its moments, by where and never by a product: NaN times 0 is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from gossamer.parallel.flat_state import StateGroup, spread_run
from torch import Tensor, nn

MASK, WINDOW, WEIGHT = "mask", "window", "weight"
"""Kinds of rows beside masters and moments: bool; float32 sums of dense gradients; float32, what
the forward pass sees of masters that live on under their mask."""
MOMENTS = ("exp_avg", "exp_avg_sq")
DIGEST_ELEMENTS = 1 << 22
SPREAD = 0x1E3779B97F4A7C15


class Flow(Protocol):
    """What masked weights do in a step. Equal flows do the same. All tensors are flat, float32, of
    one length; masks are bool, True for what is kept."""

    @property
    def keeps_dense(self) -> bool:
        """False: masked weights, their gradients and moments are 0; nothing else is asked."""
        ...

    @property
    def replaces_adamw(self) -> bool:
        """True: `adamw` makes the step instead of the optimizer and `gradient`."""
        ...

    def forward(self, weight: Tensor, mask: Tensor) -> Tensor:
        """What the forward pass takes for the weights."""
        ...

    def gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """The gradient, already clipped, as the optimizer is to see it."""
        ...

    def adamw(
        self,
        weight: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        mask: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """One step in place on weight and moments; `step` counts from 1."""
        ...


@dataclass(slots=True)
class _Span:
    """Neighbouring tensors of equal flows: a slice of the shard."""

    at: slice
    flow: Flow
    then: Flow
    """Of the forward passes after the step."""
    is_scored: bool
    before: dict[str, Tensor] = field(default_factory=dict)
    """weight, gradient and moments before the optimizer's step, where its result is replaced."""


@dataclass(slots=True)
class _Held:
    """What one shard has besides masters and moments."""

    mask: Tensor
    window: Tensor | None = None
    dense: Tensor | None = None
    """The true weights, while the parameter holds what the forward pass sees."""
    spans: list[_Span] = field(default_factory=list)


class Masks:
    """Of one rank's shards; every rank makes the same calls. Before `set_flows` it does nothing."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        states: Callable[[], Sequence[StateGroup]],
        refresh_weights: Callable[[], None],
    ) -> None:
        """`refresh_weights`, a collective, makes the model's weights from the parameters."""
        self._optimizer, self._states = optimizer, states
        self._refresh_weights = refresh_weights
        self._held: dict[nn.Parameter, _Held] = {}
        self._told: tuple[dict[str, Flow], dict[str, Flow], frozenset[str]] = {}, {}, frozenset()
        self._pending: list[tuple[Tensor, Tensor]] = []

    # --- for the trainer ------------------------------------------------------------------------

    def set_flows(
        self, flows: Mapping[str, Flow], then: Mapping[str, Flow], scored: Iterable[str] = ()
    ) -> None:
        """The flow of each governed tensor (of all ranks) in the next step, and after it.

        `scored`: those whose dense gradient the step adds to their window. The first call holds
        masks that keep everything; later ones govern the same names. Collective where weights
        begin or cease to live on under their mask.
        """
        told = dict(flows), dict(then), frozenset(scored)
        if told == self._told:
            return
        (was, expected, _), self._told = self._told, told
        if not self._held:
            for state in self._states():
                flat = state.parameter.detach().view(-1)
                self._held[state.parameter] = _Held(torch.ones_like(flat, dtype=torch.bool))
            self._optimizer.register_step_pre_hook(self._before_step)
            self._optimizer.register_step_post_hook(self._after_step)
        elif was.keys() != flows.keys():
            raise ValueError("set_flows: expected the names of the first call")
        if told[2]:
            self.open_window()
        is_dense = any(flow.keeps_dense for flow in flows.values())
        for parameter, held in self._held.items():
            if is_dense and held.dense is None:
                held.dense = parameter.detach().view(-1).clone()
        self._find_spans()
        if was and any(
            f not in (was[n], expected[n]) or f.keeps_dense != was[n].keeps_dense
            for n, f in flows.items()
        ):
            self.apply()
            self._refresh_weights()

    def set_masks(
        self,
        names: Iterable[str],
        masks: Mapping[tuple[str, int], Tensor],
        reset_moments: Iterable[str] = (),
    ) -> None:
        """New masks of `names`: of all rows that this rank owns, bool, by (name, first row).

        What must be 0 under them becomes 0, and so do all moments of `reset_moments`. Collective.
        """
        changed, reset = frozenset(names), frozenset(reset_moments)
        for state in self._states():
            held = self._held[state.parameter]
            for run in state.layout.runs():
                if run.segment.name in changed:
                    rows = masks.get((run.segment.name, run.row_start))
                    spread_run(state, run, None if rows is None else rows.reshape(-1), held.mask)
            for segment in state.layout.segments:
                if segment.name in reset:
                    for moment in self._moments(state.parameter).values():
                        moment[state.local(segment.start, segment.stop)] = 0.0
        self.apply()
        self._refresh_weights()

    def copies_agree(self) -> bool:
        """Whether ranks that hold the same shard hold the same masks. A collective call."""
        agree = torch.ones((), dtype=torch.int64)
        for state in self._states():
            if state.is_replicated and dist.get_world_size(state.process_group) > 1:
                word = _digest(self._held[state.parameter].mask)
                ends = torch.stack([word, -word])
                dist.all_reduce(ends, dist.ReduceOp.MIN, group=state.process_group)
                agree *= int(ends.sum() == 0)
        dist.all_reduce(agree, dist.ReduceOp.MIN)
        return bool(agree)

    @property
    def has_window(self) -> bool:
        """Sums of gradients are held."""
        return any(held.window is not None for held in self._held.values())

    def open_window(self) -> None:
        """Makes room for sums of gradients, from a step or from a checkpoint."""
        for parameter, held in self._held.items():
            if held.window is None:
                held.window = torch.zeros_like(parameter.detach().view(-1))

    def clear_window(self, names: Iterable[str], is_over: bool) -> None:
        """Forgets the sums of gradients of `names`; if it is over, all of them and their room."""
        cleared = frozenset(names)
        for state in self._states():
            held = self._held[state.parameter]
            for segment in state.layout.segments:
                if held.window is not None and segment.name in cleared:
                    held.window[state.local(segment.start, segment.stop)] = 0.0
            if is_over:
                held.window = None

    # --- for the engine -------------------------------------------------------------------------

    def master(self, state: StateGroup) -> Tensor:
        """This rank's flat shard of the true weights."""
        held = self._held.get(state.parameter)
        if held is None or held.dense is None:
            return state.parameter.detach().view(-1)
        return held.dense

    def seen(self, state: StateGroup, name: str) -> dict[str, Tensor]:
        """The shard as the forward pass sees it, where that is not the master of this tensor."""
        held = self._held.get(state.parameter)
        if held is None or held.dense is None or name not in self._told[0]:
            return {}
        return {WEIGHT: state.parameter.detach().view(-1)}

    def beside(self, state: StateGroup, name: str | None = None) -> dict[str, Tensor]:
        """The shard's mask and open window; nothing if the tensor `name` is not governed."""
        held = self._held.get(state.parameter)
        if held is None or (name is not None and name not in self._told[0]):
            return {}
        return {MASK: held.mask} if held.window is None else {WINDOW: held.window, MASK: held.mask}

    def apply(self) -> None:
        """Makes parameters and moments what masters, masks and flows say; after any of it moved."""
        self._find_spans()
        for parameter, held in self._held.items():
            weight = parameter.detach().view(-1)
            if held.dense is not None:
                weight.copy_(held.dense)
            for span in held.spans:
                if not span.flow.keeps_dense:
                    off = ~held.mask[span.at]
                    kept = [weight, *self._moments(parameter).values()]
                    for each in kept if held.dense is None else [*kept, held.dense]:
                        each[span.at].masked_fill_(off, 0.0)
                else:
                    assert held.dense is not None
                    weight[span.at] = span.flow.forward(held.dense[span.at], held.mask[span.at])
        if not any(flow.keeps_dense for flow in self._told[0].values()):
            for held in self._held.values():
                held.dense = None

    def take_gradient(self, state: StateGroup, start: int, gradient: Tensor) -> None:
        """Zeroes a piece of gradient, flat from local element `start`, off the mask, in place."""
        held = self._held.get(state.parameter)
        for span in held.spans if held else ():
            low, high = max(span.at.start, start), min(span.at.stop, start + len(gradient))
            if low >= high:
                continue
            assert held is not None
            piece = gradient[low - start : high - start]
            if span.is_scored:
                assert held.window is not None
                finite = torch.where(piece.isfinite(), piece, 0.0)
                self._pending.append((held.window[low:high], finite))
            if not span.flow.keeps_dense:
                piece.masked_fill_(~held.mask[low:high], 0.0)

    def close_step(self, is_finite: bool) -> None:
        """Adds what `take_gradient` saw to the windows, unless the step is dropped."""
        for window, gradient in self._pending if is_finite else ():
            window.add_(gradient)
        self._pending.clear()

    # --- parts ----------------------------------------------------------------------------------

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        found = self._optimizer.state.get(parameter, {})
        return {kind: found[kind].view(-1) for kind in MOMENTS if kind in found}

    def _find_spans(self) -> None:
        flows, then, scored = self._told
        for state in self._states() if self._held else ():
            spans = self._held[state.parameter].spans = []
            for segment in sorted(state.layout.segments, key=lambda s: s.start):
                name, at = segment.name, state.local(segment.start, segment.stop)
                if name not in flows or at.start >= at.stop:
                    continue
                new = _Span(at, flows[name], then[name], name in scored)
                last = spans[-1] if spans else None
                if last and last.at.stop == at.start and _told(last) == _told(new):
                    last.at = slice(last.at.start, at.stop)
                else:
                    spans.append(new)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:  # noqa: ANN401
        for parameter in _stepped(optimizer):
            held, moments = self._held[parameter], self._moments(parameter)
            for span in held.spans:
                if not span.flow.keeps_dense:
                    continue
                assert held.dense is not None and parameter.grad is not None
                mask, dense = held.mask[span.at], held.dense[span.at]
                gradient = parameter.grad.view(-1)[span.at]
                parameter.detach().view(-1)[span.at] = dense
                if span.flow.replaces_adamw:
                    span.before = {"weight": dense.clone(), "gradient": gradient.clone()}
                    for kind in MOMENTS:
                        moment = moments.get(kind)
                        start = torch.zeros_like(dense) if moment is None else moment[span.at]
                        span.before[kind] = start.clone()
                else:
                    gradient.copy_(span.flow.gradient(gradient, dense, mask))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:  # noqa: ANN401
        for group in optimizer.param_groups:
            for parameter in _stepped(optimizer, group):
                self._settle(parameter, group)

    def _settle(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        held, weight = self._held[parameter], parameter.detach().view(-1)
        if held.dense is None:
            return
        for span in held.spans:
            if span.before:
                before = span.before
                span.flow.adamw(
                    before["weight"],
                    before["gradient"],
                    before["exp_avg"],
                    before["exp_avg_sq"],
                    held.mask[span.at],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=int(self._optimizer.state[parameter]["step"]),
                )
                weight[span.at] = span.before["weight"]
                for kind, moment in self._moments(parameter).items():
                    moment[span.at] = span.before[kind]
                span.before = {}
        held.dense.copy_(weight)
        for span in held.spans:
            if span.then.keeps_dense:
                weight[span.at] = span.then.forward(held.dense[span.at], held.mask[span.at])


def _digest(mask: Tensor) -> Tensor:
    """63 bits of which elements are kept."""
    total = torch.zeros((), dtype=torch.int64, device=mask.device)
    for i, piece in enumerate(mask.split(DIGEST_ELEMENTS)):
        word = (piece.nonzero() + (i * DIGEST_ELEMENTS + 1)) * SPREAD
        total += ((word ^ (word >> 29)) * SPREAD).sum()  # wraps
    return total >> 1


def _told(span: _Span) -> tuple[Flow, Flow, bool]:
    return span.flow, span.then, span.is_scored


def _stepped(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any] | None = None
) -> list[nn.Parameter]:
    """Parameters that this call of the optimizer steps."""
    groups = optimizer.param_groups if group is None else [group]
    return [p for g in groups for p in g["params"] if p.grad is not None]
