"""Exact match of greedy answers without sampling any.

The one idea: greedy decoding gives the reference answer exactly when, fed the reference, the
model's first choice is the next reference token at every place of it, end-of-sequence token
included. So one forward pass over prompt + answer measures it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.batch import first_fit, pack
from gossamer.trainer.data.source import Source
from gossamer.trainer.model import MoEModel


@torch.no_grad()
def greedy_exact_match(model: MoEModel, dims: ParallelDims, source: Source, seq_len: int) -> float:
    """Share of the source's documents whose learned tokens are all the model's first choice.

    A collective call: ranks share the rows.
    """
    lengths = [len(document.token_ids) for document in source.documents]
    rows = first_fit(lengths, seq_len)
    batch, learned = pack(source.documents, rows, seq_len)
    mine = batch.split(dims.rank, dims.world_size)
    model.context.is_real_T = mine.is_real_BS.flatten()
    model.context.token_T = model.context.sequence_T = None
    for block in model.blocks:
        block.gate.train(False)  # an update puts it back
    logits_BSV = model.module(
        input_ids=mine.token_ids_BS, position_ids=mine.position_ids_BS, use_cache=False
    ).logits
    is_first_BS = logits_BSV.argmax(dim=-1) == mine.token_ids_BS.roll(-1, dims=1)
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
