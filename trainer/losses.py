"""Losses as sums over tokens: whoever knows the global token count divides by it.

The one idea: a sum adds up over rows, micro-batches and ranks without knowing how they were cut.
Only places with a weight are looked at, so memory goes with what is learned; their half-precision
logits are raised to float32, wider ones stay as they are.

Shape suffixes: B rows, S places of a row, V vocabulary, T places with a weight (row by row).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gossamer.trainer.batch import TokenBatch


def next_token_loss_sum(logits_BSV: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Sum over places of weight x cross-entropy (nats) of the next token; a scalar.

    A batch without a weight gives 0 and gradients of 0.
    """
    learned_BS, targets_T = _learned(batch)
    logits_TV = _at_least_float32(logits_BSV[learned_BS])
    loss_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    return (loss_T * batch.weights_BS[learned_BS]).sum()


def learned_logprobs(
    logits_BSV: torch.Tensor, batch: TokenBatch, temperature: float
) -> torch.Tensor:
    """Log-probabilities [T] of the learned tokens under softmax(logits / temperature)."""
    learned_BS, targets_T = _learned(batch)
    return token_logprobs(logits_BSV[learned_BS], targets_T, temperature)


def token_logprobs(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probability [T] of each target under softmax(logits / temperature)."""
    scaled_TV = _at_least_float32(logits_TV) / temperature
    return scaled_TV.gather(-1, targets_T.unsqueeze(-1)).squeeze(-1) - scaled_TV.logsumexp(-1)


def _learned(batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The places with a weight, a mask [B, S], and the token ids [T] they predict."""
    learned_BS = batch.weights_BS != 0
    return learned_BS, batch.token_ids_BS.roll(-1, dims=1)[learned_BS]


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
