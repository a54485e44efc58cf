"""comm/names.py: the names and bytes of save_pretrained, and no copy."""

import pytest
import torch
from gossamer.comm.names import logical_views
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

TINY = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "mlp_only_layers": [1],
    "tie_word_embeddings": False,
}


def tiny_model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_names_and_values_are_those_of_save_pretrained(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    views = logical_views(model.named_parameters())
    assert views.keys() == saved.keys()
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in views
    for name, view in views.items():
        assert view.is_contiguous() and view.dtype == saved[name].dtype
        assert torch.equal(view.view(torch.int16), saved[name].view(torch.int16)), name


def test_writing_a_view_writes_the_model():
    model = tiny_model()
    views = logical_views(model.named_parameters())
    experts = model.model.layers[0].mlp.experts
    views["model.layers.0.mlp.experts.2.gate_proj.weight"].fill_(1.0)
    views["model.layers.0.mlp.experts.2.up_proj.weight"].fill_(2.0)
    views["model.layers.0.mlp.experts.1.down_proj.weight"].fill_(3.0)
    assert (experts.gate_up_proj[2, :24] == 1).all() and (experts.gate_up_proj[2, 24:] == 2).all()
    assert (experts.down_proj[1] == 3).all()
    bytes_viewed = sum(view.nbytes for view in views.values())
    assert bytes_viewed == sum(p.nbytes for p in model.parameters())


def test_expert_offset_counts_from_the_first_expert_of_the_rank():
    fused = torch.arange(2 * 6 * 4.0).view(2, 6, 4)
    views = logical_views([("l.mlp.experts.gate_up_proj", fused)], expert_offset=5)
    assert sorted(views) == [
        f"l.mlp.experts.{e}.{p}.weight" for e in (5, 6) for p in ("gate_proj", "up_proj")
    ]
    assert torch.equal(views["l.mlp.experts.6.up_proj.weight"], fused[1, 3:])


def test_names_that_are_logical_already_stay():
    weight = torch.zeros(3, 4)
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    assert list(logical_views([(name, weight)])) == [name]


@pytest.mark.parametrize("leaf", ["gate_up_proj_bias", "w1"])
def test_another_expert_layout_is_refused(leaf):
    with pytest.raises(ValueError, match=rf"experts\.{leaf} .*gate_up_proj \[E, 2F, D\]"):
        logical_views([(f"model.layers.0.mlp.experts.{leaf}", torch.zeros(2, 6))])
