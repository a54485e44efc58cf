"""The contestants of `gossamer bench moe`: one MoE layer by five makers, on the same weights.

The one idea: each peer is the maker's own layer as its own code builds it, taken out of the engine
around it, so that nothing but the layer is timed: transformers' block with two of its experts
implementations, what DeepSpeed's AutoEP puts in that block's place, and DeepSpeed's older MoE layer
with transformers' SwiGLU MLP as its expert. All are dropless and renormalise their top-k weights;
none computes a balance loss but the last, which always does.

Shapes: T tokens of a rank, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import build_dims
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.families import build_block
from gossamer.trainer.moe.block import StepContext
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

OURS = "gossamer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One layer and its step."""

    experts: int
    top_k: int
    ep: int
    """Ranks, which share the experts; each has tokens of its own."""
    dtype: str
    hidden: int = 512
    width: int = 256
    """Of an expert."""
    tokens: int = 2048
    """Of a rank."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A contestant."""

    module: nn.Module
    gate: nn.Parameter
    """The router's matrix, which every rank has; the rest is this rank's."""

    def __call__(self, x_1TD: Tensor) -> Tensor:
        """y_1TD."""
        y = self.module(x_1TD)
        return y[0] if isinstance(y, tuple) else y


def join_deepspeed(ep: int) -> None:
    """Makes DeepSpeed use the process group that is there, with expert groups of `ep` ranks."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would want a compiler
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    groups._create_expert_and_data_parallel(ep)


def contestants(ep: int) -> dict[str, Callable[[Shape], Layer]]:
    """Ours first; transformers spreads no experts over ranks, so it is there at EP=1 alone."""
    peers: dict[str, Callable[[Shape], Layer]] = {OURS: ours}
    if ep == 1:
        peers["transformers eager"] = lambda shape: transformers_block(shape, "eager")
        peers["transformers grouped_mm"] = lambda shape: transformers_block(shape, "grouped_mm")
    return {**peers, "DeepSpeed AutoEP": autoep, "DeepSpeed MoE": legacy_moe}


def ours(shape: Shape) -> Layer:
    """Our block as a Qwen3-MoE model gets it, without a balance loss."""
    hf, model = _model(shape, "eager")
    config = ModelConfig(hf={"model_type": hf.model_type}, balance_loss_coef=0.0)
    dims = build_dims(ParallelConfig(expert=shape.ep))
    block = build_block(_block(model), hf, config, dims, StepContext(), layer=0, seed=0)
    return Layer(block, block.get_parameter("gate.weight"))


def transformers_block(shape: Shape, experts: str) -> Layer:
    """Qwen3-MoE's own block; `experts` is transformers' experts_implementation."""
    block = _block(_model(shape, experts)[1])
    return Layer(block, block.gate.weight)


def autoep(shape: Shape) -> Layer:
    """With AutoEP's defaults, which were its fastest settings here."""
    _, model = _model(shape, "grouped_mm")
    config = AutoEPConfig(enabled=True, autoep_size=shape.ep, preset_model="qwen3_moe")
    swap = AutoEP(model, config)
    swap.replace_moe_layers(swap.ep_parser(), shape.ep, dist.get_rank())
    layer = _block(model)
    layer.set_deepspeed_parallelism()
    return Layer(layer, layer.router.gate.weight)


def legacy_moe(shape: Shape) -> Layer:
    """deepspeed.moe.layer.MoE, which pads every expert to the fullest one's rows."""
    hf, model = _model(shape, "eager")
    source = _block(model)
    layer = MoE(
        shape.hidden,
        Qwen3MoeMLP(hf, shape.width),
        shape.experts,
        shape.ep,
        k=shape.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
        min_capacity=0,
    ).to(getattr(torch, shape.dtype))
    layer.set_deepspeed_parallelism()
    gate, experts = layer.deepspeed_moe.gate.wg.weight, layer.deepspeed_moe.experts
    first = dist.get_rank() * layer.num_local_experts
    with torch.no_grad():
        gate.copy_(source.gate.weight)
        for e, expert in enumerate(experts.deepspeed_experts, first):
            gate_up_FD = source.experts.gate_up_proj[e].chunk(2)
            for into, weight in zip((expert.gate_proj, expert.up_proj), gate_up_FD, strict=True):
                into.weight.copy_(weight)
            expert.down_proj.weight.copy_(source.experts.down_proj[e])
    return Layer(layer, gate)


def _model(shape: Shape, experts: str) -> tuple[PretrainedConfig, nn.Module]:
    """A model of one such layer and next to nothing else, the same weights each time."""
    hf = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
        vocab_size=8,
    )
    model = AutoModelForCausalLM.from_config(
        hf, dtype=getattr(torch, shape.dtype), experts_implementation=experts
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in _block(model).parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * weight.shape[-1] ** -0.5)
    return hf, model


def _block(model: nn.Module) -> Any:  # noqa: ANN401
    return model.get_submodule("model.layers.0.mlp")
