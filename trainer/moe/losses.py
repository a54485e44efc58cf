"""Losses and loads of one layer, from what its router decided.

The one idea: everything is a sum over tokens divided by the global token count, so shares of ranks
add up. A load is a constant to the gradient; only the probabilities learn.

Balance: E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961), f_e the share of (token, slot)
pairs that went to expert e, P_e its mean probability. Whose pairs f counts is the scope: one
rank's rows of a micro-batch; each document's own (DeepSeek-V3, arXiv 2412.19437); or the global
batch (arXiv 2501.11873). Sequence and global-batch scope do not depend on EP or DP.
Router z-loss: ST-MoE (arXiv 2202.08906).

Shapes: T tokens, E experts, Q documents.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(share_E: Tensor, probability_TE: Tensor, num_tokens: Tensor) -> Tensor:
    """This rank's share of E * sum_e f_e P_e, f = share_E; num_tokens: of all ranks."""
    return len(share_E) * (share_E * probability_TE.sum(0)).sum() / num_tokens


def sequence_balance_loss(
    count_QE: Tensor, probability_TE: Tensor, sequence_T: Tensor, num_tokens: Tensor
) -> Tensor:
    """The same within each document, documents weighted by their tokens."""
    share_QE = count_QE.to(probability_TE.dtype) / count_QE.sum(1, keepdim=True).clamp(min=1)
    probability_QE = torch.zeros_like(share_QE).index_add(0, sequence_T, probability_TE)
    return count_QE.shape[1] * (share_QE * probability_QE).sum() / num_tokens


def squared_logsumexp(logits_TE: Tensor) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2."""
    return logits_TE.logsumexp(dim=-1).square().sum()


def load_metrics(count_E: Tensor) -> dict[str, float]:
    """Of one layer's token counts: max over mean, entropy as a share of its most, dead experts."""
    total = int(count_E.sum())
    if total == 0:
        return {"load_max_over_mean": 0.0, "load_entropy": 0.0, "dead_experts": len(count_E)}
    share_E = count_E.double() / total
    entropy = float(-torch.special.xlogy(share_E, share_E).sum())
    most = float(torch.tensor(len(count_E), dtype=torch.float64).log())
    return {
        "load_max_over_mean": float(share_E.max()) * len(count_E),
        "load_entropy": max(0.0, entropy / most) if most else 1.0,
        "dead_experts": int((count_E == 0).sum()),
    }
