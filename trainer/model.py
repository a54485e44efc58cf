"""Hugging Face models in and out: build or load, put our MoE block in place of theirs, export.

The one idea: the model stays transformers' own but for the MoE blocks, whose parameters keep the
checkpoint's names; so import, export and the weight log need no translation beyond views.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gossamer.comm.names import logical_views
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.import_path import resolve
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.router import ROUTERS, RouterSpec
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

HF_MOE_BLOCKS = (Qwen3MoeSparseMoeBlock,)


@dataclass(frozen=True, slots=True)
class MoEModel:
    """A causal language model whose MoE blocks are ours."""

    module: nn.Module
    config: PretrainedConfig
    blocks: list[MoEBlock]
    """In layer order."""
    context: StepContext
    segments: dict[str, list[tuple[str, tuple[int, ...]]]]
    """Parameter name -> logical tensors (name, shape) it is made of, in memory order."""

    def num_parameters(self) -> tuple[int, int]:
        """(all, active for one token) of the whole model, over all expert-parallel ranks."""
        total = active = 0
        for name, parameter in self.module.named_parameters():
            if ".experts." in name:
                block = self.blocks[0]
                whole = parameter.numel() // parameter.shape[0] * block.num_experts
                total += whole
                active += whole * self.config.num_experts_per_tok // block.num_experts
            else:
                total += parameter.numel()
                active += parameter.numel()
        return total, active


def hf_config(config: ModelConfig, overrides: dict[str, int]) -> PretrainedConfig:
    """The Hugging Face config that `config` and the tokenizer's `overrides` describe.

    Raises FileNotFoundError or ValueError for a folder without one, or a model type that
    transformers does not know.
    """
    if config.path is None:
        fields, where = dict(config.hf), "model.hf.model_type"
    else:
        path = Path(config.path) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"model.path={config.path} has no config.json; expected a Hugging Face folder"
            )
        try:
            fields, where = json.loads(path.read_text()), f"{path}: model_type"
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{where} is {model_type!r}, which transformers does not know; expected qwen3_moe"
        )
    if config.path is not None:
        loaded = AutoConfig.from_pretrained(config.path)
        if loaded.vocab_size < overrides.get("vocab_size", 0):
            raise ValueError(
                f"model.path={config.path} has {loaded.vocab_size} tokens; expected at least the"
                f" {overrides['vocab_size']} of its tokenizer"
            )
        return loaded
    return AutoConfig.for_model(model_type, **{**fields, **overrides})


def build_model(
    config: ModelConfig, hf: PretrainedConfig, dims: ParallelDims, seed: int
) -> MoEModel:
    """Builds or loads the model in float32 and keeps this rank's experts.

    Every rank draws the same random weights from `seed`, so the start does not depend on EP.
    Raises ValueError for a model without MoE blocks we know, or experts that EP does not divide.
    """
    torch.manual_seed(seed)
    if config.path is not None:
        module = AutoModelForCausalLM.from_pretrained(
            config.path, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    else:
        module = AutoModelForCausalLM.from_config(
            hf, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    context = StepContext()
    blocks: list[MoEBlock] = []
    for name, block in list(module.named_modules()):
        if isinstance(block, HF_MOE_BLOCKS):
            ours = _swap(block, config, dims, context)
            module.set_submodule(name, ours)
            blocks.append(ours)
    if not blocks:
        raise ValueError(
            f"model type {hf.model_type} has no MoE block that gossamer knows; expected qwen3_moe"
        )
    offset = dims.local_experts(blocks[0].num_experts).start
    segments = logical_segments(module, offset)
    return MoEModel(module, hf, blocks, context, segments)


def _swap(
    block: Qwen3MoeSparseMoeBlock, config: ModelConfig, dims: ParallelDims, context: StepContext
) -> MoEBlock:
    build_router = resolve(config.router, ROUTERS, "model.router")
    dispatcher = Dispatcher(dims, block.experts.num_experts)
    mine = dims.local_experts(block.experts.num_experts)
    local = slice(mine.start, mine.stop)
    experts = GroupedExperts(
        block.experts.gate_up_proj.detach()[local].clone(),
        block.experts.down_proj.detach()[local].clone(),
    )
    spec = RouterSpec(
        top_k=block.gate.top_k, is_renormalised=block.gate.norm_topk_prob, moe=config.moe
    )
    gate = build_router(block.gate.weight.detach().clone(), spec)
    return MoEBlock(gate, experts, dispatcher, context, config.balance_loss_coef > 0)


def logical_segments(
    module: nn.Module, expert_offset: int
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Which logical tensors each parameter is made of, in memory order."""
    segments: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in module.named_parameters():
        views = logical_views([(name, parameter)], expert_offset)
        ordered = sorted(views.items(), key=lambda item: item[1].storage_offset())
        segments[name] = [(logical, tuple(view.shape)) for logical, view in ordered]
        assert sum(math.prod(shape) for _, shape in segments[name]) == parameter.numel()
    return segments


def export_hf(
    folder: Path,
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    write_tokenizer: Callable[[Path], None] | None = None,
) -> None:
    """Writes a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

    `weights`: logical tensors under checkpoint names, of one dtype; bytes are kept as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    if write_tokenizer is not None:
        write_tokenizer(folder)
    save_file(contiguous, folder / ".model.safetensors", metadata={"format": "pt"})
    (folder / ".model.safetensors").replace(folder / "model.safetensors")
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config)).__name__
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    described = config.to_dict() | {"architectures": [architecture], "dtype": dtype}
    # last: a folder without it is no model
    (folder / ".config.json").write_text(json.dumps(described, indent=2, sort_keys=True))
    (folder / ".config.json").replace(folder / "config.json")
