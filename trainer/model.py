"""Hugging Face models in and out: build or load, put our MoE block in place of theirs, export.

The one idea: the model stays transformers' own but for the MoE blocks, whose parameters keep the
checkpoint's names; so import, export and the weight log need no translation beyond views.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gossamer.comm.names import checkpoint_name, logical_views
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.families import (
    build_block,
    check_family,
    materialise,
    moe_blocks,
)
from gossamer.trainer.hf_folder import HFFolder, write_shards
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.config import FAMILY_ROUTERS
from gossamer.trainer.step.recompute import recompute
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)


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

    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides parameters, the same on every rank: routing biases."""
        saved = self.module.state_dict(keep_vars=True)
        found = {name: b for name, b in self.module.named_buffers() if name in saved}
        return {checkpoint_name(n, self.config.model_type): b for n, b in found.items()}

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


def hf_config(config: ModelConfig, overrides: Mapping[str, int | None]) -> PretrainedConfig:
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
            f"{where} is {model_type!r}, which transformers does not know; expected one of"
            f" {', '.join(FAMILY_ROUTERS)}"
        )
    if config.path is not None:
        loaded = AutoConfig.from_pretrained(config.path)
        if loaded.vocab_size < (overrides.get("vocab_size") or 0):
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

    Every rank draws the same random weights from `seed`, so the start does not depend on EP; of a
    folder, a rank reads what it keeps and nothing else. Raises ValueError for a family that is not
    known, or experts that EP does not divide, ValueError or FileNotFoundError for a folder that
    does not hold the model's tensors.
    """
    check_family(hf)
    folder = HFFolder(Path(config.path)) if config.path is not None else None
    described = copy.deepcopy(hf)
    if getattr(described, "output_router_logits", False):
        described.output_router_logits = False  # transformers' own balance loss wants its routers
    torch.manual_seed(seed)
    with torch.device("meta" if folder else "cpu"):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(
            described, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    expected = _checkpoint_names(module)
    context = StepContext()
    blocks: list[MoEBlock] = []
    for name, block in moe_blocks(module):
        ours = build_block(block, hf, config, dims, context, len(blocks), seed)
        module.set_submodule(name, ours)
        blocks.append(ours)
    if not blocks:
        raise ValueError(f"the {hf.model_type} model has no MoE layer; expected at least one")
    if config.recompute != "none":
        recompute(blocks if config.recompute == "moe" else module.get_decoder().layers, context)
    offset = dims.local_experts(blocks[0].num_experts).start
    segments = logical_segments(module, offset, hf.model_type)
    model = MoEModel(module, hf, blocks, context, segments)
    if folder is not None:
        _check_names(folder, module, expected, model.buffers().keys())
        materialise(module)
        for part in module.modules():
            if part._non_persistent_buffers_set:
                module._init_weights(part)  # rotary frequencies are in no checkpoint
        views = logical_views(module.named_parameters(), offset, hf.model_type) | model.buffers()
        # a router that is not the family's own may have a buffer that no checkpoint has yet
        folder.read_into({n: v for n, v in views.items() if n in folder.names | expected})
    return model


def _checkpoint_names(module: PreTrainedModel) -> set[str]:
    """Of all that a checkpoint of transformers' own model holds, tied tensors under each name."""
    own = {**dict(module.named_parameters()), **module.state_dict()}
    return set(logical_views(own.items(), model_type=module.config.model_type))


def _check_names(
    folder: HFFolder, module: PreTrainedModel, expected: set[str], buffers: Iterable[str]
) -> None:
    """Refuses a folder with other tensors than `expected`, which are those of all ranks."""
    model_type = module.config.model_type
    tied = {checkpoint_name(name, model_type) for name in module.all_tied_weights_keys}
    ignored = [r"rotary_emb\.inv_freq$", *(module._keys_to_ignore_on_load_unexpected or ())]
    strange = folder.names - expected - set(buffers)
    strange = {name for name in strange if not any(re.search(i, name) for i in ignored)}
    for names, fault in (
        (expected - folder.names - tied, "lacks"),
        (strange, "holds, and the model does not,"),
    ):
        if names:
            raise ValueError(
                f"{folder.folder} {fault} {min(names)} and {len(names) - 1} more tensors; expected"
                f" those of a {model_type} checkpoint with its config"
            )


def logical_segments(
    module: nn.Module,
    expert_offset: int,
    model_type: str = "",
    placed: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Which logical tensors each parameter is made of, in memory order; see logical_views."""
    segments: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in module.named_parameters():
        views = logical_views([(name, parameter)], expert_offset, model_type, placed)
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
    if write_tokenizer is not None:
        write_tokenizer(folder)
    write_shards(folder, weights.items())
    dtype = next(t.dtype for name, t in weights.items() if name.endswith("weight"))
    write_config(folder, config, dtype)


def write_config(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Writes config.json, last of all files: a folder without it is no model."""
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(copy.deepcopy(config))).__name__
    own = {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}
    (folder / ".config.json").write_text(
        json.dumps(config.to_dict() | own, indent=2, sort_keys=True)
    )
    (folder / ".config.json").replace(folder / "config.json")
