"""Model FLOPs of a step, and the FLOP/s that ranks could do: together the MFU.

The one idea: counted is what the model asks for, 6 FLOPs for each active weight of a matrix and
token, and 6 for each pair of places times a head's query and value widths (with equal widths 12 L H
Q T): PaLM, appendix B (Chowdhery et al., 2022, arXiv 2204.02311). Which expert weights are active
is counted from where tokens went. Padding, recomputed passes and the optimizer do not count;
attention counts as over the whole row, as there, though documents of a row do not see each other.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from gossamer.trainer.model import MoEModel

MATMUL_SIZE, MATMUL_REPEATS = 1024, 5


def step_flops(model: MoEModel, tokens: int, pairs: int, seq_len: int) -> float:
    """FLOPs of forward and backward over `tokens`, whose experts were `pairs` (all layers)."""
    config, block = model.config, model.blocks[0]
    expert = sum(weight[0].numel() for weight in block.experts.parameters())
    embedding = model.module.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    looked_up = {id(embedding)} if not config.tie_word_embeddings else set()
    dense = sum(
        weight.numel()
        for name, weight in model.module.named_parameters()
        if weight.ndim == 2 and ".experts." not in name and id(weight) not in looked_up
    )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths = getattr(config, "qk_head_dim", head_dim) + getattr(config, "v_head_dim", head_dim)
    attention = config.num_hidden_layers * heads * widths * seq_len
    return 6.0 * (tokens * (dense + attention) + pairs * expert)


def measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s of all ranks together in a square matrix product, all at once, the best of five.

    A collective call.
    """
    x = torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype)
    best_s = float("inf")
    dist.barrier()
    for _ in range(1 + MATMUL_REPEATS):
        start_s = time.perf_counter()
        x @ x
        best_s = min(best_s, time.perf_counter() - start_s)
    peak = torch.tensor(2.0 * MATMUL_SIZE**3 / best_s, dtype=torch.float64)
    dist.all_reduce(peak)
    return float(peak)
