"""One small transformers model of each family, with random weights in every tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "routed_scaling_factor": 2.5,
    },
}
NUM_EXPERTS = 8


def hf_fields(family: str) -> dict:
    return {"model_type": family, **SIZES, **FAMILIES[family]}


def transformers_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(8)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_fields(family)), dtype=dtype)
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # float32, large enough to change choices
            module.e_score_correction_bias.data = torch.randn(NUM_EXPERTS) * 0.3
    return model.eval()


def save(model: PreTrainedModel, folder: Path, shard_size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder
