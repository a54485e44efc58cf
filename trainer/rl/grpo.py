"""GRPO and its kin: a sample is as good as it is better than the other answers to its question.

The one idea: the group of a prompt is its own baseline, so no value model is learned; what papers
differ in are a baseline, a divisor and a weight, each a switch of one loss. It is a sum over
completion tokens, to be divided by `loss_divisor`. Ratios are against the log-probabilities that
the rollout engine reported, so staleness and the engine's own arithmetic are both corrected for.
GRPO: Shao et al. 2024, arXiv:2402.03300. Without division by standard deviation and length: Dr.
GRPO, Liu et al. 2025, arXiv:2503.20783. Token mean, a higher upper clip, dynamic sampling: DAPO, Yu
et al. 2025, arXiv:2503.14476. The other samples as the baseline: RLOO, Ahmadian et al. 2024,
arXiv:2402.14740. Truncated importance weights: IMPALA, Espeholt et al. 2018, arXiv:1802.01561;
CISPO, MiniMax 2025, arXiv:2506.13585. Decoupled PPO: Hilton et al. 2021, arXiv:2110.00641, its
proximal policy read off token versions: A-3PO, Li et al. 2025, arXiv:2512.06547.

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
from torch import Tensor

MAX_LOG_RATIO = 20.0  # beyond it exp() only serves to overflow; the KL goes on as a straight line


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyBatch(TokenBatch):
    """Packed prompts and completions; weights are not 0 where a completion token is predicted.

    All further fields are float32 and tell of that token; 0 elsewhere.
    """

    advantages_BS: Tensor
    """The advantage of the token's sample."""
    behaviour_logprobs_BS: Tensor
    """The log-probability that the engine reported."""
    staleness_BS: Tensor
    """Versions between the weights that sampled the token and those that learn from it."""
    reference_logprobs_BS: Tensor
    """The log-probability under the reference policy; 0 where the loss has no KL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """Sums over completion tokens (scalars)."""

    loss_sum: Tensor
    """The one with a gradient; divide by `loss_divisor`."""
    ratio_sum: Tensor
    """Of policy to behaviour probabilities."""
    clipped_sum: Tensor
    """Tokens whose clip (or cap) bound."""
    kl_sum: Tensor
    """Of the KL estimates to the reference; 0 without."""


def group_advantages(
    rewards_PG: Tensor, normalise_by_std: bool, eps: float = 1e-6, leave_one_out: bool = False
) -> Tensor:
    """Reward minus its group's mean [P, G], over the group's population std + eps if asked for.

    leave_one_out: minus the mean of the others, which is G / (G - 1) times as far.
    """
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if leave_one_out:
        group_size = rewards_PG.shape[1]
        advantages_PG = advantages_PG * (group_size / (group_size - 1))
    if not normalise_by_std:
        return advantages_PG
    return advantages_PG / (rewards_PG.std(dim=1, keepdim=True, correction=0) + eps)


def loss_divisor(batch: TokenBatch, config: RLConfig) -> float:
    """What the summed loss of the whole batch is divided by: its weights, or its samples."""
    if not isinstance(batch, PolicyBatch) or config.loss_mean == "tokens":
        return float(batch.weights_BS.double().sum())
    learned_BS = batch.weights_BS != 0
    # between two completions of a row is a prompt; the last place of a row predicts nothing
    return float((learned_BS & ~learned_BS.roll(1, dims=1)).sum())


def policy_loss(logits_BSV: Tensor, batch: PolicyBatch, config: RLConfig) -> PolicyLoss:
    """The surrogate that config chooses, and the KL to the reference if it has a weight.

    r is the ratio of policy to behaviour probability, A the advantage.
    Clipped: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). Truncated (importance_cap): -min(r,
    cap) A log p, with no gradient through the weight. Decoupled: the clipped one with the ratio to
    the proximal policy, times min(proximal / behaviour, cap). KL: exp(d) - d - 1, d = log
    reference - log p.
    """
    learned_BS = batch.weights_BS != 0
    weights_T = batch.weights_BS[learned_BS]
    advantages_T = batch.advantages_BS[learned_BS]
    behaviour_T = batch.behaviour_logprobs_BS[learned_BS]
    logprobs_T = learned_logprobs(logits_BSV, batch, config.temperature)
    ratio_T = _ratio(logprobs_T, behaviour_T)
    cap = config.importance_cap
    if config.decoupled:
        proximal_T = proximal_logprobs(
            logprobs_T.detach(), behaviour_T, batch.staleness_BS[learned_BS]
        )
        importance_T = _ratio(proximal_T, behaviour_T)
        loss_T, is_clipped_T = _clipped(_ratio(logprobs_T, proximal_T), advantages_T, config)
        if cap is not None:
            is_clipped_T = is_clipped_T | (importance_T > cap)
            importance_T = importance_T.clamp(max=cap)
        loss_T = loss_T * importance_T
    elif cap is None:
        loss_T, is_clipped_T = _clipped(ratio_T, advantages_T, config)
    else:
        is_clipped_T = ratio_T > cap
        loss_T = -ratio_T.detach().clamp(max=cap) * advantages_T * logprobs_T
    kl_sum = logprobs_T.new_zeros(())
    if config.kl_coef:
        difference_T = batch.reference_logprobs_BS[learned_BS] - logprobs_T
        beyond_T = (difference_T - MAX_LOG_RATIO).clamp(min=0.0)
        power_T = difference_T.clamp(max=MAX_LOG_RATIO).exp() * (1.0 + beyond_T)
        kl_T = power_T - difference_T - 1.0
        loss_T = loss_T + config.kl_coef * kl_T
        kl_sum = kl_T.detach().sum()
    return PolicyLoss(
        loss_sum=(loss_T * weights_T).sum(),
        ratio_sum=ratio_T.detach().sum(),
        clipped_sum=is_clipped_T.sum(),
        kl_sum=kl_sum,
    )


def proximal_logprobs(logprobs_T: Tensor, behaviour_T: Tensor, staleness_T: Tensor) -> Tensor:
    """Log-probabilities [T] of the policy one version back, between behaviour and policy.

    Of a token d versions old it is (d - 1) / d of the way; up to d = 1 it is the behaviour policy.
    """
    share_T = (staleness_T - 1.0).clamp(min=0.0) / staleness_T.clamp(min=1.0)
    return behaviour_T + share_T * (logprobs_T - behaviour_T)


def _ratio(logprobs_T: Tensor, others_T: Tensor) -> Tensor:
    return (logprobs_T - others_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped(ratio_T: Tensor, advantages_T: Tensor, config: RLConfig) -> tuple[Tensor, Tensor]:
    """(loss, whether the clip bound) of each token."""
    bounded_T = ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantages_T
    return -torch.minimum(ratio_T * advantages_T, bounded_T), bounded_T < ratio_T * advantages_T


def pack_samples(
    samples: Sequence[Sample],
    prompts: Sequence[Sequence[int]],
    advantages: Sequence[float],
    config: RLConfig,
    version: int,
    rows_multiple: int = 1,
) -> PolicyBatch:
    """Packs prompt + completion of each sample, first fit in order, weighted by config.loss_mean.

    prompts, advantages: of each sample. version: the one that learns from them. rows_multiple: zero
    rows fill B up to a multiple of it. Raises ValueError for a sample longer than config.seq_len.
    """
    documents = [
        Document(token_ids=[*prompt, *sample.token_ids], learn_from=len(prompt))
        for sample, prompt in zip(samples, prompts, strict=True)
    ]
    rows = first_fit([len(document.token_ids) for document in documents], config.seq_len)
    rows += [[] for _ in range(-len(rows) % rows_multiple)]
    batch, learned = pack(documents, rows, config.seq_len)
    advantages_BS, behaviour_logprobs_BS, staleness_BS, reference_logprobs_BS = (
        torch.zeros_like(batch.weights_BS) for _ in range(4)
    )
    order = [item for row in rows for item in row]
    for item, (row, places) in zip(order, learned, strict=True):
        sample = samples[item]
        advantages_BS[row, places] = advantages[item]
        behaviour_logprobs_BS[row, places] = torch.tensor(sample.logprobs)
        for span in sample.spans:
            first = places.start
            staleness_BS[row, first + span.start : first + span.stop] = version - span.version
        if config.loss_mean == "samples":
            batch.weights_BS[row, places] = 1.0 / len(sample.token_ids)
        elif config.loss_mean == "fixed":
            batch.weights_BS[row, places] = 1.0 / config.max_new_tokens
    return PolicyBatch.from_tensors(
        [
            *batch.to_tensors(),
            advantages_BS,
            behaviour_logprobs_BS,
            staleness_BS,
            reference_logprobs_BS,
        ]
    )
