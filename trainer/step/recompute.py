"""Activation recompute: parts of the model run a second time in the backward pass.

The one idea: a part runs again whole, in the order of the backward pass, which is the same on every
rank; so its collectives meet, however few tokens a rank has. The second run draws the same random
numbers and leaves no statistics. Chen et al., 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from gossamer.trainer.moe.block import StepContext
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(parts: Iterable[nn.Module], context: StepContext) -> None:
    """From now on, `parts` keep only their inputs for the backward pass."""
    for part in parts:
        part.forward = partial(_run, part.forward, context)  # type: ignore[method-assign]


def _run(
    forward: Callable[..., Any],
    context: StepContext,
    *inputs: Any,  # noqa: ANN401
    **named: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _again(context)

    # stopping early would leave out the last collectives, and on what it stops is torch's affair
    return checkpoint(
        forward, *inputs, use_reentrant=False, context_fn=contexts, early_stop=False, **named
    )


@contextmanager
def _again(context: StepContext) -> Iterator[None]:
    context.is_recomputing = True
    try:
        yield
    finally:
        context.is_recomputing = False
