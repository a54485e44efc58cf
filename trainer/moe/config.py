"""What the MoE blocks of a model can be told, whatever its family. No torch here.

The one idea: schedules are functions of the optimizer step, so a resumed run needs no state but
its step; whatever cannot be right is refused here, by the field's name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ROUTERS = {
    "topk_softmax": "gossamer.trainer.moe.routers.topk_softmax:TopKSoftmaxRouter",
    "sigmoid_bias": "gossamer.trainer.moe.routers.sigmoid_bias:SigmoidBiasRouter",
    "dense_to_sparse": "gossamer.trainer.moe.routers.dense_to_sparse:DenseToSparseRouter",
    "smoe_dropout": "gossamer.trainer.moe.routers.smoe_dropout:SMoEDropoutRouter",
}
"""Each is built as `build(weight_ED, spec)`, spec being a RouterSpec."""

FAMILY_ROUTERS = {
    "qwen3_moe": "topk_softmax",
    "mixtral": "topk_softmax",
    "olmoe": "topk_softmax",
    "deepseek_v3": "sigmoid_bias",
}
"""The router of each model type that is known; model.router may name another."""

BALANCE_SCOPES = ("micro_batch", "sequence", "global_batch")
TEMPERATURE_DECAYS = ("exponential", "linear")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseToSparseConfig:
    """EvoMoE's gate (router dense_to_sparse): first one expert, then all, then fewer and fewer."""

    diversify_steps: int = 0
    """Steps in which expert 0 alone is trained; then all become copies of it, each with a random
    mask. 0 = experts start as they are."""
    masked_share: float = 0.1
    """Share of each copy's elements that the mask sets to zero."""
    decay: str = "exponential"
    """How the temperature falls: exponential or linear."""
    max_temperature: float = 2.0
    """Of the Gumbel softmax at its first step."""
    min_temperature: float = 0.3
    """Reached decay_steps later."""
    decay_steps: int = 10_000
    """Steps from max_temperature to min_temperature; afterwards the gate is top-k."""
    threshold: float = 0.001
    """An expert whose gate is above this is used."""

    def __post_init__(self) -> None:
        where = "model.moe.dense_to_sparse"
        _require(
            self.decay in TEMPERATURE_DECAYS,
            f"{where}.decay is {self.decay}; expected one of {TEMPERATURE_DECAYS}",
        )
        _require(
            0.0 < self.min_temperature <= self.max_temperature,
            f"{where}.min_temperature is {self.min_temperature};"
            f" expected above 0 and at most max_temperature={self.max_temperature}",
        )
        _require(
            self.diversify_steps >= 0 and self.decay_steps >= 1,
            f"{where}: diversify_steps is {self.diversify_steps} and decay_steps"
            f" {self.decay_steps}; expected at least 0 and 1",
        )
        for name in ("masked_share", "threshold"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"{where}.{name} is {value}; expected 0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowingKConfig:
    """SMoE-Dropout (router smoe_dropout): k grows linearly with the optimizer step."""

    min_k: int = 1
    """Experts of a token at step 0."""
    max_k: int | None = None
    """Experts of a token from step grow_steps on; None = all experts."""
    grow_steps: int = 10_000
    """Steps from min_k to max_k."""
    eval_k: int | None = None
    """Experts of a token in evaluation; None = as many as in training at that step."""

    def __post_init__(self) -> None:
        where = "model.moe.smoe_dropout"
        _require(
            self.min_k >= 1 and (self.max_k is None or self.max_k >= self.min_k),
            f"{where}: min_k is {self.min_k} and max_k {self.max_k}; expected 1 <= min_k <= max_k",
        )
        _require(self.grow_steps >= 1, f"{where}.grow_steps is {self.grow_steps}; expected >= 1")
        _require(
            self.eval_k is None or self.eval_k >= 1,
            f"{where}.eval_k is {self.eval_k}; expected at least 1 or null",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Routing, its losses and its trace."""

    softmax_after_topk: bool = False
    """topk_softmax: the softmax is over the chosen experts alone instead of over all."""
    bias_update_rate: float = 0.001
    """sigmoid_bias: what an expert's bias moves by per optimizer step, against its load; 0 = the
    bias stays as the checkpoint has it."""
    balance_scope: str = "global_batch"
    """Whose token counts the balance loss takes: micro_batch (this rank's), sequence (each
    document's own) or global_batch (all ranks', and the step's earlier micro-batches')."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss, the mean of logsumexp(logits)^2; 0 switches it off."""
    dense_to_sparse: DenseToSparseConfig = field(default_factory=DenseToSparseConfig)
    """EvoMoE's schedule."""
    smoe_dropout: GrowingKConfig = field(default_factory=GrowingKConfig)
    """SMoE-Dropout's schedule."""
    trace_path: str | None = None
    """Folder, in the run's unless absolute, that every rank writes router_trace_rank{rank}.jsonl
    to; None = no trace."""
    trace_steps: int = 100
    """The trace ends after this optimizer step."""

    def __post_init__(self) -> None:
        _require(
            self.balance_scope in BALANCE_SCOPES,
            f"model.moe.balance_scope is {self.balance_scope}; expected one of {BALANCE_SCOPES}",
        )
        for name in ("bias_update_rate", "z_loss_coef"):
            value = getattr(self, name)
            _require(value >= 0.0, f"model.moe.{name} is {value}; expected 0 or more")
        _require(
            self.trace_steps >= 1, f"model.moe.trace_steps is {self.trace_steps}; expected >= 1"
        )
