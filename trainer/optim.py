"""Optimizer and learning rates: AdamW on float32 masters, a warm-up and a curve per phase.

The one idea: the rate is a pure function of the phase and of the updates done in it, so that no
scheduler state has to be saved. AdamW: Loshchilov and Hutter, 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gossamer.trainer.step.config import OptimConfig, PhaseConfig
from torch import Tensor


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over parameter groups; a group's own weight_decay wins.

    Not fused and not per tensor list: each element's result must not depend on where in a flat
    shard it lies.
    """
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=False,
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; norms, biases and what is frozen do not."""
    return parameter.ndim >= 2 and not getattr(parameter, "is_frozen", False)


def lr_at(phase: PhaseConfig, phase_step: int) -> float:
    """Learning rate of update number `phase_step` (from 0) of the phase.

    wsd (warm-up, stable, decay): Hu et al., 2024 (arXiv 2404.06395).
    """
    if phase_step < phase.warmup_steps:
        return phase.lr * (phase_step + 1) / phase.warmup_steps
    falls_from = phase.max_steps - phase.decay_steps if phase.decay_steps else phase.warmup_steps
    progress = (phase_step - falls_from) / max(1, phase.max_steps - falls_from)
    progress = min(1.0, max(0.0, progress))
    if phase.schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - progress
    return phase.lr * (phase.final_lr_share + (1.0 - phase.final_lr_share) * left)
