"""GRPO: a sample is as good as it is better than the other answers to its question.

The one idea: the group of a prompt is its own baseline, so no value model is learned. The loss is a
sum over completion tokens, to be divided by the global token count, so that a token weighs the same
in a short completion as in a long one. Ratios are against the log-probabilities that the rollout
engine reported, so staleness and the engine's own arithmetic are both corrected for.
GRPO: Shao et al. 2024, arXiv:2402.03300. Without the division by the standard deviation: Dr. GRPO,
Liu et al. 2025, arXiv:2503.20783. Token mean and a higher upper clip: DAPO, Yu et al. 2025,
arXiv:2503.14476. Truncated importance weights: IMPALA, Espeholt et al. 2018, arXiv:1802.01561;
CISPO, MiniMax 2025, arXiv:2506.13585.

Shape suffixes: P prompts, G samples of a prompt, B rows, S places of a row, V vocabulary, T
completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gossamer.comm.rollout import Sample
from gossamer.trainer.batch import Document, TokenBatch, first_fit, pack
from gossamer.trainer.losses import learned_logprobs
from gossamer.trainer.rl.config import RLConfig

MAX_LOG_RATIO = 20.0  # beyond it exp() only serves to overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyBatch(TokenBatch):
    """Packed prompts and completions; weights are 1 where a completion token is predicted."""

    advantages_BS: torch.Tensor
    """float32; the sample's advantage where the weight is 1."""
    behaviour_logprobs_BS: torch.Tensor
    """float32; the engine's log-probability of the predicted token where the weight is 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """Sums over completion tokens (scalars): divide by the global token count."""

    loss_sum: torch.Tensor
    """The one with a gradient."""
    ratio_sum: torch.Tensor
    """Of policy to behaviour probabilities."""
    clipped_sum: torch.Tensor
    """Tokens whose clip (or cap) bound."""


def group_advantages(
    rewards_PG: torch.Tensor, normalise_by_std: bool, eps: float = 1e-6
) -> torch.Tensor:
    """Reward minus its group's mean [P, G], over the group's population std + eps if asked for."""
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if not normalise_by_std:
        return advantages_PG
    return advantages_PG / (rewards_PG.std(dim=1, keepdim=True, correction=0) + eps)


def policy_loss(logits_BSV: torch.Tensor, batch: PolicyBatch, config: RLConfig) -> PolicyLoss:
    """The clipped surrogate, or with config.importance_cap a truncated policy gradient.

    Clipped: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). Truncated: -min(r, cap) A log p,
    with no gradient through the weight. r is the ratio of policy to behaviour probability.
    """
    learned_BS = batch.weights_BS != 0
    advantages_T = batch.advantages_BS[learned_BS]
    logprobs_T = learned_logprobs(logits_BSV, batch, config.temperature)
    log_ratio_T = logprobs_T - batch.behaviour_logprobs_BS[learned_BS]
    ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.importance_cap is None:
        bounded_T = ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantages_T
        is_clipped_T = bounded_T < ratio_T * advantages_T
        loss_T = -torch.minimum(ratio_T * advantages_T, bounded_T)
    else:
        is_clipped_T = ratio_T > config.importance_cap
        loss_T = -ratio_T.detach().clamp(max=config.importance_cap) * advantages_T * logprobs_T
    return PolicyLoss(
        loss_sum=(loss_T * batch.weights_BS[learned_BS]).sum(),
        ratio_sum=ratio_T.detach().sum(),
        clipped_sum=is_clipped_T.sum(),
    )


def pack_samples(
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[int]],
    advantages: Sequence[float],
    seq_len: int,
    rows_multiple: int = 1,
) -> PolicyBatch:
    """Packs prompt + completion of each sample, first fit in order.

    prompts, advantages: of each sample. rows_multiple: zero rows fill B up to a multiple of it.
    Raises ValueError for a sample that is longer than seq_len.
    """
    documents = [
        Document(token_ids=[*prompt, *sample.token_ids], learn_from=len(prompt))
        for sample, prompt in zip(samples, prompts, strict=True)
    ]
    rows = first_fit([len(document.token_ids) for document in documents], seq_len)
    rows += [[] for _ in range(-len(rows) % rows_multiple)]
    batch, learned = pack(documents, rows, seq_len)
    advantages_BS = torch.zeros_like(batch.weights_BS)
    behaviour_logprobs_BS = torch.zeros_like(batch.weights_BS)
    order = [item for row in rows for item in row]
    for item, (row, places) in zip(order, learned, strict=True):
        advantages_BS[row, places] = advantages[item]
        behaviour_logprobs_BS[row, places] = torch.tensor(samples[item].logprobs)
    return PolicyBatch.from_tensors([*batch.to_tensors(), advantages_BS, behaviour_logprobs_BS])
