"""Models in and out: transformers' own logits from ours, and the same bytes from what we export."""

import json

import pytest
import torch
from gossamer.comm.names import logical_views
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.model import build_model, export_hf, hf_config
from gossamer.trainer.moe.block import MoEBlock
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

ALONE = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
FIELDS = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "intermediate_size": 40,
    "mlp_only_layers": [1],
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
TOKEN_IDS_BS = torch.randint(0, 90, (3, 17), generator=torch.Generator().manual_seed(1))


def transformers_model(**fields) -> Qwen3MoeForCausalLM:
    torch.manual_seed(8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**FIELDS, **fields})).eval()


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=TOKEN_IDS_BS, use_cache=False).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_loaded_model_gives_transformers_own_logits(tmp_path, attention, norm_topk_prob):
    theirs = transformers_model(norm_topk_prob=norm_topk_prob)
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation(attention)
    config = ModelConfig(path=str(tmp_path), attn_implementation=attention)
    model = build_model(config, hf_config(config, {}), ALONE, seed=0)
    assert model.module.config._attn_implementation == attention
    assert len(model.blocks) == 2  # layer 1 is dense
    found, expected = logits(model.module), logits(theirs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_exported_model_is_loaded_byte_by_byte(tmp_path, is_tied):
    config = ModelConfig(hf={"model_type": "qwen3_moe", **FIELDS, "tie_word_embeddings": is_tied})
    hf = hf_config(config, {"vocab_size": 90, "pad_token_id": 0, "eos_token_id": 2})
    model = build_model(config, hf, ALONE, seed=4)
    weights = {
        name: view.to(torch.bfloat16)
        for name, view in logical_views(model.module.named_parameters()).items()
    }
    written = []
    export_hf(tmp_path / "out", hf, weights, written.append)
    assert written == [tmp_path / "out"]

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert type(loaded) is Qwen3MoeForCausalLM
    assert (loaded.config.pad_token_id, loaded.config.eos_token_id) == (0, 2)
    held = logical_views(loaded.named_parameters())
    assert held.keys() == weights.keys()
    for name, weight in weights.items():
        assert held[name].dtype == torch.bfloat16
        assert torch.equal(held[name].view(torch.int16), weight.view(torch.int16)), name

    # the same weights in the same arithmetic give the same logits
    for parameter in model.module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    expected = logits(model.module)
    found = logits(loaded.float())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["config.json", "model.safetensors"]


def test_the_start_does_not_depend_on_expert_parallelism():
    """Each rank holds its slice of the same random experts, and everything else alike."""
    config = ModelConfig(hf={"model_type": "qwen3_moe", **FIELDS})
    hf = hf_config(config, {})
    whole = logical_views(build_model(config, hf, ALONE, seed=5).module.named_parameters())
    seen = set()
    for rank in range(3):
        dims = ParallelDims(data=1, expert=3, rank=rank, expert_group=None)
        model = build_model(config, hf, dims, seed=5)
        held = logical_views(model.module.named_parameters(), dims.local_experts(6).start)
        assert all(torch.equal(whole[name], weight) for name, weight in held.items())
        named = [(name, shape) for parts in model.segments.values() for name, shape in parts]
        assert dict(named) == {name: tuple(weight.shape) for name, weight in held.items()}
        seen |= held.keys()
    assert seen == whole.keys()
    again = build_model(config, hf, ALONE, seed=6).module.state_dict()
    assert not torch.equal(again["lm_head.weight"], whole["lm_head.weight"])


def test_segments_lie_in_memory_order():
    config = ModelConfig(hf={"model_type": "qwen3_moe", **FIELDS})
    model = build_model(config, hf_config(config, {}), ALONE, seed=5)
    parameters = dict(model.module.named_parameters())
    views = logical_views(parameters.items())
    for name, parts in model.segments.items():
        flat = torch.cat([views[logical].flatten() for logical, _ in parts])
        assert torch.equal(flat, parameters[name].detach().flatten())


def test_parameters_are_counted_over_all_ranks_and_by_what_a_token_uses():
    config = ModelConfig(hf={"model_type": "qwen3_moe", **FIELDS})
    hf = hf_config(config, {})
    whole = transformers_model().num_parameters()
    expert = 3 * 32 * 20
    for ranks in (1, 2):
        dims = ParallelDims(data=1, expert=ranks, rank=0, expert_group=None)
        model = build_model(config, hf, dims, seed=5)
        assert model.num_parameters() == (whole, whole - 2 * (6 - 2) * expert)


def refused(config: ModelConfig) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        build_model(config, hf_config(config, {}), ALONE, seed=0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize("family", ["qwen99_moe", "qwen3"])
def test_a_model_type_without_our_blocks_is_refused_by_the_config(family):
    with pytest.raises(ValueError, match=f"model.hf.model_type is {family}; .* qwen3_moe"):
        ModelConfig(hf={"model_type": family})


def test_a_folder_of_a_model_without_our_blocks_is_refused(tmp_path):
    dense = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    text = json.dumps({**dense, "intermediate_size": 8, "head_dim": 8})
    (tmp_path / "config.json").write_text(text)
    message = refused(ModelConfig(path=str(tmp_path)))
    assert "qwen3 has no MoE block" in message and "expected qwen3_moe" in message


def test_a_folder_without_a_config_is_refused(tmp_path):
    message = refused(ModelConfig(path=str(tmp_path)))
    assert str(tmp_path) in message and "config.json" in message


def test_a_folder_with_a_broken_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    message = refused(ModelConfig(path=str(tmp_path)))
    assert str(tmp_path) in message and "config.json" in message


def test_a_folder_of_an_unknown_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen99_moe"}))
    message = refused(ModelConfig(path=str(tmp_path)))
    assert str(tmp_path) in message and "qwen99_moe" in message


def test_experts_that_do_not_divide_are_refused():
    config = ModelConfig(hf={"model_type": "qwen3_moe", **FIELDS})
    dims = ParallelDims(data=1, expert=4, rank=0, expert_group=None)
    with pytest.raises(ValueError, match=r"^parallel.expert=4 does not divide .* 6 experts$"):
        build_model(config, hf_config(config, {}), dims, seed=0)


def test_blocks_keep_the_checkpoints_names():
    config = ModelConfig(hf={"model_type": "qwen3_moe", **FIELDS})
    module = build_model(config, hf_config(config, {}), ALONE, seed=0).module
    ours = {name: tuple(p.shape) for name, p in module.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in transformers_model().named_parameters()}
    assert ours == theirs
    assert sum(isinstance(block, MoEBlock) for block in module.modules()) == 2
