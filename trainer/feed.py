"""The feed: what the next update learns from, drawn by rank 0 and told to all ranks.

The one idea: only rank 0 reads data or talks to rollout engines; the others receive the batch as
tensors, so all ranks run the same plan without holding any of its state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import PhaseConfig, TrainConfig
from gossamer.trainer.data.mixture import build_sources, heldout_sources
from gossamer.trainer.data.stream import TokenStream, build_loader
from gossamer.trainer.rl.grpo import PolicyBatch
from gossamer.trainer.rl.rollouts import RolloutBatches, RolloutSource, RolloutStatistics
from gossamer.trainer.task import TaskProblems
from gossamer.trainer.tokenizer import Tokenizer
from torchdata.stateful_dataloader import StatefulDataLoader

DTYPES = (torch.int64, torch.int64, *[torch.float32] * 5)
"""Of the fields of TokenBatch and PolicyBatch, in order."""
MEET_S = 60.0
"""Far less than what gloo lets a rank wait for the others (half an hour, by Ray's default)."""
T = TypeVar("T")


class Feed:
    """Rank 0's readers; every rank calls `draw`."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        problems: TaskProblems | None,
        rollouts: RolloutSource | None,
        data_state: dict[str, Any] | None,
    ) -> None:
        """data_state: what `state` gave, to go on from there.

        Raises ValueError for a grpo phase on rank 0 without rollouts, and for data that cannot be
        read or is not that of the state.
        """
        self._config, self._tokenizer, self._problems = config, tokenizer, problems
        self._loaders: dict[str, StatefulDataLoader] = {}
        self._batches: dict[str, Iterator[TokenBatch]] = {}
        self.rollouts: RolloutBatches | None = None
        if dist.get_rank() != 0:
            return
        for kind in sorted({phase.kind for phase in config.phases} - {"grpo"}):
            sources = build_sources(config, tokenizer, problems, kind)
            loader = self._loaders[kind] = build_loader(sources, config.data, config.seed)
            if data_state is not None and kind in data_state:
                loader.load_state_dict(data_state[kind])
            self._batches[kind] = iter(loader)
        if rollouts is not None and problems is not None:
            rows_multiple = config.parallel.world_size
            self.rollouts = RolloutBatches(rollouts, tokenizer, problems, config, rows_multiple)
        elif any(phase.kind == "grpo" for phase in config.phases):
            raise ValueError("a grpo phase needs rollout engines and a task; expected both")

    def draw(
        self, phase: PhaseConfig, phase_step: int
    ) -> tuple[TokenBatch, RolloutStatistics | None]:
        """The batch of the phase's update `phase_step`; statistics of rollouts on rank 0."""
        if phase.kind != "grpo":
            # only rank 0 has any
            drawn = next(self._batches[phase.kind]) if phase.kind in self._batches else None
            return _broadcast(drawn, TokenBatch), None
        rollouts = self.rollouts
        found = of_first_rank(partial(rollouts.collect, phase_step) if rollouts else None)
        batch, statistics = found or (None, None)
        return _broadcast(batch, PolicyBatch), statistics

    def heldout_exact_match(self) -> tuple[float, int] | None:
        """See RolloutBatches; on rank 0 alone. A collective call."""
        return of_first_rank(self.rollouts.heldout_exact_match if self.rollouts else None)

    def heldout(self, kind: str) -> TokenBatch:
        """The rows of config.heldout for phases of `kind`: the same ones on every call and rank.

        A collective call. Raises ValueError on rank 0 when nothing is held out.
        """
        batch = None
        if dist.get_rank() == 0:
            sources = heldout_sources(self._config, self._tokenizer, self._problems, kind)
            data = replace(self._config.data, num_rows=self._config.heldout.num_rows)
            batch = next(TokenStream(sources, data, seed=0))
        return _broadcast(batch, TokenBatch)

    def state(self) -> dict[str, Any] | None:
        """Data position by kind of phase, JSON; None on ranks that do not read."""
        if dist.get_rank() != 0:
            return None
        return {kind: loader.state_dict() for kind, loader in self._loaders.items()}


def of_first_rank(call: Callable[[], T] | None) -> T | None:
    """What rank 0's `call` returns, there alone, however long it takes. A collective call.

    call: None on the other ranks. Raises on rank 0 what it raises. While it waits for engines, say
    for a server that is away, all ranks meet every MEET_S, so no collective times out.
    """
    if call is not None and dist.get_world_size() == 1:
        return call()
    answer: Future[T] = Future()
    if call is not None:
        # not an executor's: that one's threads would be waited for when the process ends
        threading.Thread(target=_answer, args=(answer, call), daemon=True).start()
    is_there = torch.tensor(0)
    while not is_there:
        if call is not None and wait([answer], MEET_S).done:
            answer.result()  # or raises
            is_there += 1
        dist.broadcast(is_there, src=0)
    return answer.result() if call is not None else None


def _answer(answer: Future[T], call: Callable[[], T]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:
        answer.set_exception(error)


def _broadcast(batch: TokenBatch | None, batch_class: type[TokenBatch]) -> TokenBatch:
    """Rank 0's batch on every rank."""
    shape = torch.tensor(batch.token_ids_BS.shape if batch else (0, 0))
    dist.broadcast(shape, src=0)
    num_fields = len(fields(batch_class))
    tensors = (
        batch.to_tensors()
        if batch
        else [torch.empty(tuple(shape.tolist()), dtype=d) for d in DTYPES[:num_fields]]
    )
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
    return batch_class.from_tensors(tensors)
