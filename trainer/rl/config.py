"""What reinforcement learning can be told. No torch here.

The one idea: group-relative policy optimisation is one loss with switches; each is a field.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from gossamer.trainer.import_path import check_name

REWARDS = {
    "exact_match": "gossamer.trainer.rl.reward:exact_match",
    "reasoning_gym": "gossamer.trainer.rl.gym_reward:GymReward",
    "http": "gossamer.trainer.rl.http_reward:HTTPReward",
}
BASELINES = ("group_mean", "leave_one_out")
LOSS_MEANS = ("tokens", "samples", "fixed")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class HTTPRewardConfig:
    """A service that judges completions: POST of JSON, one request a completion."""

    url: str
    """http(s)://host/path. It is sent {"question", "answer", "completion", "finished"} and answers
    {"score": number}."""
    timeout_s: float = 10.0
    """Of one attempt, from connecting to the last byte."""
    attempts: int = 3
    """Tries of one completion: a timeout, a refused connection, 429 or 5xx is tried again."""
    token_variable: str = "GOSSAMER_REWARD_TOKEN"
    """Environment variable of the trainer's first rank whose value, where it is set, is sent as a
    bearer token: over https, or to this machine."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        _require(
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and not (parts.username or parts.password or parts.query or parts.fragment),
            "rl.http.url is not http(s)://host[:port][/path] without a user name and a query: it is"
            " written down; secrets come from rl.http.token_variable",
        )
        _require(self.timeout_s > 0, f"rl.http.timeout_s is {self.timeout_s}; expected more than 0")
        _require(self.attempts >= 1, f"rl.http.attempts is {self.attempts}; expected at least 1")


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
    """exact_match, reasoning_gym (the data set's own scorer), http, or an import path
    `package.module:name` of a function, or of a class that is built with the TrainConfig."""
    http: HTTPRewardConfig | None = None
    """Of reward http."""
    reward_workers: int = 1
    """Completions that are judged at a time, in threads: for rewards that wait."""
    drop_unscored: bool = False
    """Leave out a prompt whose reward raised, or gave no finite number; False ends the run."""
    baseline: str = "group_mean"
    """What a reward is compared with: group_mean (GRPO), or leave_one_out, the mean of the group's
    other samples (RLOO)."""
    normalise_by_std: bool = True
    """Divide advantages by the group's standard deviation; False is Dr. GRPO."""
    loss_mean: str = "tokens"
    """What the loss is a mean over: tokens (DAPO: every token weighs the same), samples (GRPO as
    published: a long completion's tokens weigh less), or fixed: the sum over tokens by samples x
    max_new_tokens (Dr. GRPO: no completion's length scales anything)."""
    train_samples_per_prompt: int | None = None
    """Train on this many samples of each group, those whose rewards differ most (PODS): cheaper
    updates for the same sampling. None = all."""
    drop_constant_groups: bool = True
    """Leave out groups whose samples all earned the same: they teach nothing (DAPO's filter)."""
    refill_rounds: int = 0
    """How often a step may ask other prompts in place of those that were left out, until it has
    prompts_per_step again (DAPO's dynamic sampling); 0 = it learns from what is left."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """The probability ratio is clipped above at 1 + clip_high."""
    max_staleness: int = 0
    """Versions that a sample may be behind the update that trains on it; 0 = on-policy, repeatable
    bit for bit; 1 = engines sample the next batch while this one is trained."""
    importance_cap: float | None = None
    """When set: no clipped surrogate, but policy gradient weighted by min(ratio, cap). With
    decoupled it caps the weight of the decoupled surrogate instead."""
    decoupled: bool = False
    """Decoupled PPO for stale samples: clips against a proximal policy one version back, which is
    told from each token's own version, and weights by proximal over behaviour."""
    kl_coef: float = 0.0
    """Weight of the KL to the policy that the phase began with, a frozen second copy of the model
    on each rank; 0 = none."""

    def __post_init__(self) -> None:
        check_name(self.reward, REWARDS, "rl.reward")
        _require(
            self.reward != "http" or self.http is not None,
            "rl.http is missing; rl.reward http expects its url",
        )
        self._check_numbers()
        self._check_groups()
        for name, known in (("baseline", BASELINES), ("loss_mean", LOSS_MEANS)):
            value = getattr(self, name)
            _require(value in known, f"rl.{name} is {value}; expected one of {known}")
        _require(
            self.baseline == "group_mean" or not self.normalise_by_std,
            f"rl.normalise_by_std is true with rl.baseline {self.baseline}; expected false",
        )
        _require(
            self.refill_rounds == 0 or self.drop_constant_groups,
            f"rl.refill_rounds is {self.refill_rounds} without rl.drop_constant_groups; expected 0",
        )

    def _check_numbers(self) -> None:
        positive = ("prompts_per_step", "prompts_per_unit", "max_new_tokens", "temperature")
        for name in (*positive, "reward_workers"):
            value = getattr(self, name)
            _require(value > 0, f"rl.{name} is {value}; expected a positive number")
        for name in ("clip_high", "max_staleness", "refill_rounds", "kl_coef"):
            value = getattr(self, name)
            _require(value >= 0, f"rl.{name} is {value}; expected 0 or more")
        _require(
            0.0 <= self.clip_low < 1.0,
            f"rl.clip_low is {self.clip_low}; expected a number from 0 to below 1",
        )
        _require(
            self.importance_cap is None or self.importance_cap > 0.0,
            f"rl.importance_cap is {self.importance_cap}; expected a positive number or null",
        )

    def _check_groups(self) -> None:
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
