"""The feed: what the next update learns from, drawn by rank 0 and told to all ranks.

The one idea: only rank 0 reads data or talks to rollout engines; the others receive the batch as
tensors, so all ranks run the same plan without holding any of its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import PhaseConfig, TrainConfig
from gossamer.trainer.corpus import read_documents
from gossamer.trainer.data.stream import Source, build_loader, corpus_source, task_source
from gossamer.trainer.rl.grpo import PolicyBatch
from gossamer.trainer.rl.rollouts import RolloutBatches, RolloutSource, RolloutStatistics
from gossamer.trainer.task import TaskProblems
from gossamer.trainer.tokenizer import Tokenizer
from torchdata.stateful_dataloader import StatefulDataLoader

DTYPES = (torch.int64, torch.int64, torch.float32, torch.float32, torch.float32)
"""Of the fields of TokenBatch and PolicyBatch, in order."""


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
        """Raises ValueError for a grpo phase on rank 0 without rollouts."""
        self._loader: StatefulDataLoader | None = None
        self._batches: Iterator[TokenBatch] = iter(())
        self.rollouts: RolloutBatches | None = None
        if dist.get_rank() != 0:
            return
        if any(phase.kind == "next_token" for phase in config.phases):
            sources = _sources(config, tokenizer, problems)
            self._loader = build_loader(sources, config.data, config.seed)
            if data_state is not None:
                self._loader.load_state_dict(data_state)
            self._batches = iter(self._loader)
        if rollouts is not None and problems is not None:
            rows_multiple = config.parallel.world_size
            self.rollouts = RolloutBatches(rollouts, tokenizer, problems, config, rows_multiple)
        elif any(phase.kind == "grpo" for phase in config.phases):
            raise ValueError("a grpo phase needs rollout engines and a task; expected both")

    def draw(
        self, phase: PhaseConfig, phase_step: int
    ) -> tuple[TokenBatch, RolloutStatistics | None]:
        """The batch of the phase's update `phase_step`; statistics of rollouts on rank 0."""
        if phase.kind == "next_token":
            return _broadcast(next(self._batches, None), TokenBatch), None
        batch, statistics = self.rollouts.collect(phase_step) if self.rollouts else (None, None)
        return _broadcast(batch, PolicyBatch), statistics

    def state(self) -> dict[str, Any] | None:
        """Data position, JSON; None on ranks that do not read."""
        return self._loader.state_dict() if self._loader is not None else None


def _sources(
    config: TrainConfig, tokenizer: Tokenizer, problems: TaskProblems | None
) -> list[Source]:
    data = config.data
    sources = []
    if problems is not None and data.task_share > 0:
        sources.append(task_source(tokenizer, problems.train, data.task_share, data.answer_only))
    if data.task_share < 1:
        texts = read_documents(data.corpus_path, data.corpus_chars)
        sources.append(corpus_source(tokenizer, texts, 1.0 - data.task_share, data.seq_len))
    return sources


def _broadcast(batch: TokenBatch | None, batch_class: type[TokenBatch]) -> TokenBatch:
    """Rank 0's batch on every rank."""
    shape = torch.tensor(batch.token_ids_BS.shape if batch else (0, 0))
    dist.broadcast(shape, src=0)
    num_fields = 5 if batch_class is PolicyBatch else 3
    tensors = (
        batch.to_tensors()
        if batch
        else [torch.empty(tuple(shape.tolist()), dtype=d) for d in DTYPES[:num_fields]]
    )
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
    return batch_class.from_tensors(tensors)
