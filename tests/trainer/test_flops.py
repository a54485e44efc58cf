"""Model FLOPs against torch's own count of a forward pass, and by hand."""

import pytest
import torch
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.step.flops import step_flops
from tiny_families import FAMILIES, hf_fields
from torch.utils.flop_counter import FlopCounterMode

ALONE = ParallelDims(data=1, expert=1, rank=0, expert_group=None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_forward_flops_are_a_third(family, is_tied):
    """Attention is eager, so that every pair of places is computed, as the formula has it."""
    hf = {**hf_fields(family), "tie_word_embeddings": is_tied}
    config = ModelConfig(hf=hf, attn_implementation="eager", balance_loss_coef=0.0)
    model = build_model(config, hf_config(config, {}), ALONE, seed=1)
    model.module.double()  # experts in a loop, which torch counts
    token_ids_BS = torch.randint(1, 50, (3, 10), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.module(input_ids=token_ids_BS, use_cache=False)
    pairs = sum(int(block.statistics.count_E.sum()) for block in model.blocks)
    counted = counter.get_total_flops()
    assert counted == step_flops(model, tokens=30, pairs=pairs, seq_len=10) / 3


def test_by_hand():
    """One layer, two heads of 4, 8 wide; experts 8 x 3 in three matrices; 11 tokens known."""
    hf = {
        "model_type": "qwen3_moe",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 3,
        "tie_word_embeddings": False,
        "vocab_size": 11,
    }
    config = ModelConfig(hf=hf)
    model = build_model(config, hf_config(config, {}), ALONE, seed=1)
    attention_weights = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q; k and v; o
    active = attention_weights + 8 * 4 + 2 * 3 * 8 * 3 + 11 * 8  # router, two experts, head
    assert step_flops(model, 1, 2, 0) == 6 * active
    assert step_flops(model, 5, 10, 7) == 5 * (6 * active + 12 * 1 * 2 * 4 * 7)
