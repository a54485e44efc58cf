"""Evaluation during training: loss on held-out text, and exact match of greedy answers.

The one idea: no sampling. Greedy decoding gives the reference answer exactly when, fed the
reference, the model's first choice is the next reference token at every place of it,
end-of-sequence token included. So one forward pass over prompt + answer measures it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.batch import TokenBatch, first_fit, pack
from gossamer.trainer.data.source import Source
from gossamer.trainer.losses import next_token_loss_sum
from gossamer.trainer.model import MoEModel
from torch import Tensor


@torch.no_grad()
def heldout_loss(
    model: MoEModel, dims: ParallelDims, batch: TokenBatch, micro_rows: int
) -> tuple[float, int]:
    """Mean loss (nats per weight) over all of `batch`, and how many tokens it is taken over.

    A collective call: ranks share the rows, at most micro_rows of them at a time.
    """
    mine = batch.split(dims.rank, dims.world_size)
    num_micro = -(-len(mine.token_ids_BS) // micro_rows)
    loss_sum = torch.zeros((), dtype=torch.float64)
    for index in range(num_micro):
        part = mine.split(index, num_micro)
        loss_sum += next_token_loss_sum(logits_of(model, part), part).double()
    dist.all_reduce(loss_sum)
    learned = int((batch.weights_BS != 0).sum())
    return float(loss_sum / batch.weights_BS.double().sum()), learned


@torch.no_grad()
def greedy_exact_match(model: MoEModel, dims: ParallelDims, source: Source, seq_len: int) -> float:
    """Share of the source's documents whose learned tokens are all the model's first choice.

    A collective call: ranks share the rows.
    """
    lengths = [len(document.token_ids) for document in source.documents]
    rows = first_fit(lengths, seq_len)
    batch, learned = pack(source.documents, rows, seq_len)
    mine = batch.split(dims.rank, dims.world_size)
    is_first_BS = logits_of(model, mine).argmax(dim=-1) == mine.token_ids_BS.roll(-1, dims=1)
    first_row = dims.rank * len(mine.token_ids_BS)
    right = torch.tensor(
        sum(
            bool(is_first_BS[row - first_row, places].all())
            for row, places in learned
            if first_row <= row < first_row + len(is_first_BS)
        )
    )
    dist.all_reduce(right)
    return int(right) / len(source.documents)


def logits_of(model: MoEModel, rows: TokenBatch) -> Tensor:
    """Logits [B, S, V] of `rows`, this rank's, whose losses and loads count nowhere. Collective."""
    model.context.is_real_T = rows.is_real_BS.flatten()
    model.context.token_T = model.context.sequence_T = None
    for block in model.blocks:
        block.gate.train(False)  # an update puts it back
    return model.module(
        input_ids=rows.token_ids_BS, position_ids=rows.position_ids_BS, use_cache=False
    ).logits
