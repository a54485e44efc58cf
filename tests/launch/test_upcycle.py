"""gossamer upcycle: without noise the sparse model computes what the dense one does."""

import pytest
import torch
from gossamer.launch.cli import main
from gossamer.launch.upcycle import SPARSE, Upcycling, upcycle
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.model import build_model, hf_config
from safetensors.torch import load_file
from tiny_families import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

ALONE = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
TOKEN_IDS_BS = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(1))


def dense_folder(model_type, folder, **fields):
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **{**SIZES, "head_dim": 16, **fields})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


def logits(module):
    with torch.no_grad():
        return module(input_ids=TOKEN_IDS_BS, use_cache=False).logits


def distance(module, dense):
    expected = logits(dense)
    return float((logits(module) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("model_type", SPARSE)
@pytest.mark.parametrize(
    ("experts", "top_k", "granularity"), [(4, 1, 1), (8, 2, 1), (8, 4, 2), (12, 3, 3)]
)
def test_without_noise_the_output_is_the_dense_models(
    model_type, experts, top_k, granularity, tmp_path
):
    dense = dense_folder(model_type, tmp_path / "dense", sliding_window=None)
    plan = Upcycling(experts=experts, top_k=top_k, granularity=granularity)
    out = upcycle(tmp_path / "dense", tmp_path / "sparse", plan)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.model_type == SPARSE[model_type]
    assert theirs.model.layers[0].mlp.experts.down_proj.shape == (experts, 32, 24 // granularity)
    assert distance(theirs, dense) < 1e-5
    config = ModelConfig(path=str(out))
    ours = build_model(config, hf_config(config, {}), ALONE, seed=0)
    assert distance(ours.module, dense) < 1e-5
    load_E = ours.blocks[0].statistics.count_E
    assert (load_E > 0).sum() > top_k  # the router does choose
    assert torch.equal(load_E, load_E[::granularity].repeat_interleave(granularity))
    assert (out / "tokenizer.json").read_text() == "{}"


def test_noise_tells_experts_apart_and_is_drawn_from_the_seed(tmp_path):
    dense = dense_folder("qwen3", tmp_path / "dense")
    found = {}
    for name, noise, seed in (("a", 0.05, 1), ("b", 0.05, 1), ("c", 0.05, 2)):
        plan = Upcycling(experts=4, top_k=2, noise=noise, seed=seed)
        out = upcycle(tmp_path / "dense", tmp_path / name, plan)
        found[name] = load_file(out / "model.safetensors")
        assert 1e-4 < distance(AutoModelForCausalLM.from_pretrained(out), dense) < 0.5
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    first, second = found["a"][name.format(0)], found["a"][name.format(1)]
    copied = dense.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert float((first - copied).std() / copied.std()) == pytest.approx(0.05, rel=0.1)
    assert not torch.equal(first, second)
    assert all(torch.equal(t, found["b"][n]) for n, t in found["a"].items())
    assert not torch.equal(first, found["c"][name.format(0)])


def test_bfloat16_stays_bfloat16_to_the_byte(tmp_path):
    dense = dense_folder("mistral", tmp_path / "dense", dtype="bfloat16", sliding_window=None)
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    plan = Upcycling(experts=4, top_k=2, granularity=2)
    out = upcycle(tmp_path / "dense", tmp_path / "sparse", plan)
    found, own = load_file(out / "model.safetensors"), dense.state_dict()
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    w1 = [found[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"] for e in range(4)]
    assert torch.equal(torch.cat(w1[:2]), own["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(torch.cat(w1[2:]), own["model.layers.1.mlp.gate_proj.weight"])
    w2 = [found[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(2)]
    assert torch.equal(torch.cat(w2, dim=1) / 2, own["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(found["model.norm.weight"], own["model.norm.weight"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--experts", "6", "--top-k", "2", "--granularity", "4"], "granularity 4 for 6 experts"),
        (["--experts", "4", "--top-k", "5"], "top-k is 5; expected 1 to 4"),
        (["--experts", "4", "--top-k", "2", "--noise", "-1"], "noise is -1.0"),
        (["--experts", "10", "--top-k", "5", "--granularity", "5"], "does not divide intermediate"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_a_sentence(words, expected, tmp_path, capsys):
    dense_folder("qwen3", tmp_path / "dense")
    capsys.readouterr()
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "out"), *words]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("gossamer: ") and expected in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("gpt_neox", {"head_dim": None}, "model type gpt_neox cannot be upcycled; expected qwen3"),
        ("llama", {"attention_bias": True}, "expected a model without biases"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window is true"),
    ],
)
def test_a_model_that_has_no_sparse_family_is_refused(model_type, fields, expected, tmp_path):
    dense_folder(model_type, tmp_path / "dense", **fields)
    with pytest.raises(ValueError, match=expected):
        upcycle(tmp_path / "dense", tmp_path / "out", Upcycling(experts=4, top_k=2))


def test_the_command_writes_a_folder_once(tmp_path, capsys):
    dense_folder("qwen3", tmp_path / "dense")
    words = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "out")]
    words += ["--experts", "4", "--top-k", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert main(words) == 1
    assert "holds a model already" in capsys.readouterr().err
