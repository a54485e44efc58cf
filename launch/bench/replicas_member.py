"""One replica of the benchmark: a small model, its shard of text, AdamW, and the real `Replica`.

The one idea: a member does not know where the others are. In a training they are threads of one
process, over a shaped link processes of their own; it takes the same steps and makes the same bits.

Shape suffixes: B rows, S places, V vocabulary, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from gossamer.comm.codec.part import Rows
from gossamer.comm.names import logical_views
from gossamer.comm.outer.replica import Replica
from gossamer.launch.bench.replicas_arms import Arm, Sizes
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.config import ModelConfig, TokenizerConfig
from gossamer.trainer.corpus import read_documents
from gossamer.trainer.model import build_model
from gossamer.trainer.moe.block import MoEBlock
from gossamer.trainer.optim import build_adamw, decays, lr_at
from gossamer.trainer.step.config import OptimConfig, PhaseConfig
from gossamer.trainer.tokenizer import token_fields, train_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

BALANCE_COEF = 0.01
HELDOUT_TOKENS, EVALUATED_ROWS = 50_000, 32


@dataclass(slots=True)
class Log:
    """What one replica measured."""

    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens of all replicas, held-out loss) after each round."""
    step_s: list[float] = field(default_factory=list)
    """CPU seconds of each inner step, of its one thread."""
    compute_s: list[float] = field(default_factory=list)
    """Wall seconds of the inner steps before each exchange."""
    exchange_s: list[float] = field(default_factory=list)
    """Wall seconds of each exchange, from sending to new weights."""
    round_s: list[float] = field(default_factory=list)
    """Wall seconds of each round, all in but the evaluation."""


class Member:
    """Replica `number`: what it holds and how it trains between two exchanges."""

    def __init__(self, arm: Arm, sizes: Sizes, model: str, seed: int, number: int) -> None:
        self.arm, self.sizes, self.number, self.log = arm, sizes, number, Log()
        self._model_type, self._module, self._blocks = _build(model, sizes, seed)
        named = dict(self._module.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if decays(n, p) is yes], "weight_decay": decay}
            for yes, decay in ((True, 0.1), (False, 0.0))
        ]
        # dgc brings the momentum, so the optimizer behind it must have none
        beta1 = 0.0 if arm.rule == "dgc" else 0.9
        self._optimizer = build_adamw(groups, OptimConfig(beta1=beta1, eps=1e-8))
        self._phase = PhaseConfig(
            name="all",
            kind="next_token",
            max_steps=sizes.steps,
            lr=arm.lr,
            warmup_steps=sizes.warmup_steps,
            final_lr_share=0.1,
        )
        tokens, self._heldout = text(sizes)
        share = len(tokens) // sizes.replicas
        self._tokens = tokens[number * share : (number + 1) * share]
        self._draw = torch.Generator().manual_seed(1000 * seed + number)
        self._count = [torch.zeros(block.num_experts) for block in self._blocks]

    def rows(self) -> list[Rows]:
        """Views on the weights, by logical name."""
        return self._views((name, p) for name, p in self._module.named_parameters())

    def gradients(self) -> list[Rows]:
        """Views on the gradients; what is written into them is stepped with."""
        named = self._module.named_parameters()
        return self._views((name, p.grad) for name, p in named if p.grad is not None)

    def backward(self) -> None:
        """Gradients of one batch of this replica's own."""
        ids_BS = self._batch()
        for block in self._blocks:
            block.begin_step(len(self.log.step_s))
        loss = self._loss(ids_BS)
        for block, count_E in zip(self._blocks, self._count, strict=True):
            count_E += block.statistics.count_E
            loss = loss + BALANCE_COEF * block.statistics.balance_loss
        self._optimizer.zero_grad()
        loss.backward()

    def step(self, number: int) -> None:
        """Clips the gradients and takes the optimizer's step, at the rate of step `number`."""
        nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = lr_at(self._phase, number)
        self._optimizer.step()

    def idle(self) -> set[str]:
        """Tensors of experts that saw no token since this was last asked."""
        found = set()
        for layer, count_E in enumerate(self._count):
            for expert in (count_E == 0).nonzero().flatten().tolist():
                stem = f"model.layers.{layer}.mlp.experts.{expert}"
                found |= {f"{stem}.{each}_proj.weight" for each in ("gate", "up", "down")}
            count_E.zero_()
        return found

    def take(self, replica: Replica) -> None:
        """The shared weights become this replica's own."""
        for rows in self.rows():
            rows.values.copy_(replica.rows[rows.name, 0].values)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Held-out loss, nats a token."""
        parts = self._heldout.split(EVALUATED_ROWS)
        return float(sum(self._loss(part) * len(part) for part in parts) / len(self._heldout))

    def _batch(self) -> Tensor:
        length = self.sizes.seq_len + 1
        starts = torch.randint(len(self._tokens) - length, (self.sizes.rows,), generator=self._draw)
        return torch.stack([self._tokens[start : start + length] for start in starts])

    def _loss(self, ids_BS: Tensor) -> Tensor:
        logits_BSV = self._module(input_ids=ids_BS[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())

    def _views(self, named: Iterator[tuple[str, Tensor]]) -> list[Rows]:
        views = logical_views(named, model_type=self._model_type)
        return [Rows(name, tuple(view.shape), 0, view) for name, view in views.items()]


class Clock:
    """Wall and CPU seconds of a block: `with Clock() as clock: ...; clock.wall_s, clock.cpu_s`."""

    def __enter__(self) -> Clock:
        self.wall_s, self.cpu_s = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s = time.perf_counter() - self.wall_s
        self.cpu_s = time.thread_time() - self.cpu_s


def is_present(arm: Arm, sizes: Sizes, seed: int, round_number: int, number: int) -> bool:
    """Whether a replica takes part of a round: all do in the first, two at least in every one."""
    if arm.leaves and number == sizes.replicas - 1:
        return round_number < sizes.rounds // 2
    draw = random.Random(f"{seed} {round_number}")
    order = sorted(range(sizes.replicas), key=lambda _: draw.random())
    missing = [each for each in order if draw.random() < arm.away]
    return round_number == 0 or number not in missing[: sizes.replicas - 2]


@cache
def text(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(tokens to train on, held-out rows [B, S + 1]): the standard library's source, by a BPE of
    its own; the first tokens are held out."""
    texts = list(read_documents(None, sizes.corpus_chars))
    tokenizer = _tokenizer(sizes)
    tokens = torch.tensor([token for ids in tokenizer.encode_all(texts) for token in ids])
    length = sizes.seq_len + 1
    rows = tokens[: HELDOUT_TOKENS // length * length].view(-1, length)
    chosen = torch.linspace(0, len(rows) - 1, sizes.heldout_rows).long()
    return tokens[HELDOUT_TOKENS:], rows[chosen]


@cache
def _tokenizer(sizes: Sizes):  # noqa: ANN202
    texts = read_documents(None, min(sizes.corpus_chars, 500_000))
    return train_tokenizer(texts, TokenizerConfig(vocab_size=sizes.vocab_size))


def _build(model: str, sizes: Sizes, seed: int) -> tuple[str, nn.Module, list[MoEBlock]]:
    """(model type, module, its MoE blocks): Qwen3 of transformers, or Qwen3-MoE with our blocks."""
    fields = dict(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=sizes.hidden // 4,
        intermediate_size=3 * sizes.hidden,
        tie_word_embeddings=True,
        **token_fields(_tokenizer(sizes).vocab_size),
    )
    torch.manual_seed(seed)
    if model == "dense":
        hf: PretrainedConfig = AutoConfig.for_model("qwen3", **fields)
        module = AutoModelForCausalLM.from_config(
            hf, dtype=torch.float32, attn_implementation="sdpa"
        )
        return hf.model_type, module, []
    hf = AutoConfig.for_model(
        "qwen3_moe",
        moe_intermediate_size=sizes.hidden,
        num_experts=sizes.experts,
        num_experts_per_tok=2,
        **fields,
    )
    dims = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
    built = build_model(ModelConfig(hf={"model_type": "qwen3_moe"}), hf, dims, seed)
    return hf.model_type, built.module, built.blocks
