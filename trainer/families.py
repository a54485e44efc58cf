"""Model families: which MoE blocks of transformers' we replace, and how each family routes.

The one idea: every family holds its experts fused and its gate beside them, so one swap serves all;
what differs is the router, and its settings, which are fields of the family's config.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.import_path import resolve
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.config import FAMILY_ROUTERS, ROUTERS
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.router import RouterSpec
from torch import Tensor, nn
from transformers import PretrainedConfig


def check_family(hf: PretrainedConfig) -> None:
    """Raises ValueError, in one sentence, for a model whose MoE blocks ours cannot stand in for."""
    if hf.model_type not in FAMILY_ROUTERS:
        raise ValueError(
            f"model type {hf.model_type} has no MoE block that gossamer knows; expected"
            f" {', '.join(FAMILY_ROUTERS)}"
        )
    if getattr(hf, "quantization_config", None):
        raise ValueError(
            f"the {hf.model_type} model is quantised (quantization_config in its config);"
            " expected bf16 or float32 weights"
        )
    if hf.hidden_act != "silu":
        raise ValueError(f"hidden_act is {hf.hidden_act}; experts are SwiGLU: expected silu")
    if getattr(hf, "router_jitter_noise", 0.0):
        raise ValueError(f"router_jitter_noise is {hf.router_jitter_noise}; expected 0")


def moe_blocks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """transformers' own MoE blocks by name, in layer order."""
    for name, block in list(module.named_modules()):
        if hasattr(block, "gate") and hasattr(getattr(block, "experts", None), "gate_up_proj"):
            yield name, block


def build_block(
    block: Any,  # noqa: ANN401
    hf: PretrainedConfig,
    config: ModelConfig,
    dims: ParallelDims,
    context: StepContext,
    layer: int,
    seed: int,
) -> MoEBlock:
    """Ours in place of `block`, with this rank's experts; on the CPU, empty where that is meta."""
    materialise(block.gate)
    num_experts = block.experts.num_experts
    mine = dims.local_experts(num_experts)
    experts = GroupedExperts(
        _own(block.experts.gate_up_proj, mine), _own(block.experts.down_proj, mine)
    )
    spec = RouterSpec(
        top_k=hf.num_experts_per_tok,
        is_renormalised=getattr(hf, "norm_topk_prob", True),  # Mixtral always does
        scale=getattr(hf, "routed_scaling_factor", 1.0),
        num_groups=getattr(hf, "n_group", None) or 1,
        top_groups=getattr(hf, "topk_group", None) or 1,
        bias_E=getattr(block.gate, "e_score_correction_bias", None),
        layer=layer,
        seed=seed,
        moe=config.moe,
    )
    router = config.router or FAMILY_ROUTERS[hf.model_type]
    gate = resolve(router, ROUTERS, "model.router")(block.gate.weight.detach().clone(), spec)
    return MoEBlock(
        gate,
        experts,
        Dispatcher(dims, num_experts, layer),
        context,
        config.balance_loss_coef > 0,
        getattr(block, "shared_experts", None),
    )


def _own(weight_EXY: Tensor, mine: range) -> Tensor:
    if weight_EXY.is_meta:
        return torch.empty((len(mine), *weight_EXY.shape[1:]), dtype=weight_EXY.dtype)
    return weight_EXY.detach()[mine.start : mine.stop].clone()


def materialise(module: nn.Module) -> None:
    """Gives every meta tensor of `module` storage on the CPU, unwritten; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty)
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")
