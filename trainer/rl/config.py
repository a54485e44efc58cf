"""What reinforcement learning can be told. No torch here.

The one idea: group-relative policy optimisation is one loss with switches; each is a field.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.trainer.import_path import check_name

REWARDS = {"exact_match": "gossamer.trainer.rl.reward:exact_match"}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class RLConfig:
    """Group-relative policy optimisation on the task."""

    prompts_per_step: int = 16
    """Different problems asked in one step."""
    samples_per_prompt: int = 8
    """Completions of one problem: the group that its advantages are relative to."""
    prompts_per_unit: int = 8
    """Problems of one rollout unit, which an engine runs whole; divides prompts_per_step."""
    max_new_tokens: int = 8
    """Longest completion, its end-of-sequence token included."""
    temperature: float = 1.0
    """Temperature of sampling, and of the policy's log-probabilities."""
    seq_len: int = 128
    """Tokens in a row of packed samples."""
    reward: str = "exact_match"
    """A name in trainer/rl/reward.py, or an import path `package.module:name`."""
    normalise_by_std: bool = True
    """Divide advantages by the group's standard deviation; False is Dr. GRPO."""
    train_samples_per_prompt: int | None = None
    """Train on this many samples of each group, those whose rewards differ most (PODS): cheaper
    updates for the same sampling. None = all."""
    drop_constant_groups: bool = True
    """Leave out groups whose samples all earned the same: they teach nothing (DAPO's filter)."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """The probability ratio is clipped above at 1 + clip_high."""
    max_staleness: int = 0
    """Versions that a sample may be behind the update that trains on it; 0 = on-policy, repeatable
    bit for bit; 1 = engines sample the next batch while this one is trained."""
    importance_cap: float | None = None
    """When set: no clipped surrogate, but policy gradient weighted by min(ratio, cap)."""

    def __post_init__(self) -> None:
        check_name(self.reward, REWARDS, "rl.reward")
        for name in (
            "prompts_per_step",
            "prompts_per_unit",
            "max_new_tokens",
            "temperature",
        ):
            value = getattr(self, name)
            _require(value > 0, f"rl.{name} is {value}; expected a positive number")
        _require(
            self.samples_per_prompt >= 2,
            f"rl.samples_per_prompt is {self.samples_per_prompt}; expected at least 2 for a group",
        )
        trained = self.train_samples_per_prompt
        _require(
            trained is None or 2 <= trained <= self.samples_per_prompt,
            f"rl.train_samples_per_prompt is {trained}; expected 2 to rl.samples_per_prompt",
        )
        _require(
            self.prompts_per_step % self.prompts_per_unit == 0,
            f"rl.prompts_per_unit is {self.prompts_per_unit}; expected a divisor of "
            f"rl.prompts_per_step ({self.prompts_per_step})",
        )
        _require(
            self.seq_len > self.max_new_tokens,
            f"rl.seq_len is {self.seq_len}; expected more than rl.max_new_tokens "
            f"({self.max_new_tokens})",
        )
        _require(
            0.0 <= self.clip_low < 1.0,
            f"rl.clip_low is {self.clip_low}; expected a number from 0 to below 1",
        )
        _require(
            self.max_staleness >= 0,
            f"rl.max_staleness is {self.max_staleness}; expected 0 or more",
        )
        _require(self.clip_high >= 0.0, f"rl.clip_high is {self.clip_high}; expected 0 or more")
        _require(
            self.importance_cap is None or self.importance_cap > 0.0,
            f"rl.importance_cap is {self.importance_cap}; expected a positive number or null",
        )
