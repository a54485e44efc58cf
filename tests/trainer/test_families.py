"""Every family in and out: transformers' logits, the same bytes, whatever the rank's share."""

import json
from pathlib import Path

import pytest
import torch
from gloo_world import run_world
from gossamer.comm.names import logical_views, published_dtype
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import ParallelDims, build_dims
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.model import build_model, export_hf, hf_config
from gossamer.trainer.moe.config import FAMILY_ROUTERS
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, hf_fields, save, transformers_model
from transformers import AutoModelForCausalLM

ALONE = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
TOKEN_IDS_BS = torch.randint(3, 96, (3, 17), generator=torch.Generator().manual_seed(1))


def logits(module):
    with torch.no_grad():
        return module(input_ids=TOKEN_IDS_BS, use_cache=False).logits


def load(folder, dims=ALONE):
    config = ModelConfig(path=str(folder))
    return build_model(config, hf_config(config, {}), dims, seed=0)


def held(model, offset=0):
    """All that a checkpoint of this rank's would hold."""
    named = model.module.named_parameters()
    return logical_views(named, offset, model.config.model_type) | model.buffers()


def saved(folder):
    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in load_file(path).items()}


def test_every_family_is_tried():
    assert FAMILIES.keys() == FAMILY_ROUTERS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_own(family, tmp_path):
    theirs = transformers_model(family)
    model = load(save(theirs, tmp_path, "60KB"))  # several shards and an index
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(model.blocks) == (1 if family == "deepseek_v3" else 2)
    found, expected = logits(model.module), logits(theirs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    total = sum(p.numel() for p in theirs.parameters())
    assert model.num_parameters()[0] == total > model.num_parameters()[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_float64_are_transformers_experts_on_our_routing(family, tmp_path):
    """transformers' routers and norms go through float32 always; their experts need not."""
    theirs = transformers_model(family)
    ours = load(save(theirs, tmp_path)).blocks[-1].double()
    block = theirs.model.layers[-1].mlp.double()
    x_BSD = torch.randn(2, 9, 32, dtype=torch.float64)
    routings = []
    ours.gate.register_forward_hook(lambda gate, inputs, routing: routings.append(routing))
    with torch.no_grad():
        found_TD = ours(x_BSD).view(-1, 32)
    (routing,) = routings
    theirs.config._experts_implementation = "eager"
    with torch.no_grad():
        y_TD = block.experts(x_BSD.view(-1, 32), routing.expert_TK, routing.weight_TK)
        if family == "deepseek_v3":
            y_TD = y_TD + block.shared_experts(x_BSD.view(-1, 32))
    assert (found_TD - y_TD).abs().max() <= 1e-12 * y_TD.abs().max()
    _, weight_TK, expert_TK = theirs.model.layers[-1].mlp.gate.float()(x_BSD.float().view(-1, 32))
    order, expected = routing.expert_TK.sort(dim=1), expert_TK.sort(dim=1)
    assert torch.equal(order.values, expected.values)
    weights = routing.weight_TK.gather(1, order.indices)
    assert (weights - weight_TK.gather(1, expected.indices)).abs().max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_same_after_import_and_export(family, dtype, tmp_path):
    save(transformers_model(family, dtype), tmp_path / "in")
    model = load(tmp_path / "in")
    weights = {name: t.to(published_dtype(name, dtype)) for name, t in held(model).items()}
    export_hf(tmp_path / "out", model.config, weights)
    before, after = saved(tmp_path / "in"), saved(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found, expected = logits(loaded), logits(model.module)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_names_are_those_of_published_checkpoints(tmp_path):
    names = {
        family: held(load(save(transformers_model(family), tmp_path / family))).keys()
        for family in ("mixtral", "deepseek_v3")
    }
    layer = "model.layers.1"
    assert f"{layer}.block_sparse_moe.gate.weight" in names["mixtral"]
    for leaf in ("w1", "w2", "w3"):
        assert f"{layer}.block_sparse_moe.experts.7.{leaf}.weight" in names["mixtral"]
    for leaf in (
        "gate.e_score_correction_bias",
        "shared_experts.down_proj.weight",
        "experts.7.up_proj.weight",
    ):
        assert f"{layer}.mlp.{leaf}" in names["deepseek_v3"]


def ranks_logits(folder):
    """Each family's logits and this rank's tensors, on as many ranks as there are."""
    dims = build_dims(ParallelConfig(expert=2))
    answer = {}
    for family in FAMILIES:
        model = load(Path(folder, family), dims)
        offset = dims.local_experts(8).start
        tensors = {name: tensor.clone() for name, tensor in held(model, offset).items()}
        answer[family] = {"logits": logits(model.module), "tensors": tensors}
    return answer


def test_two_ranks_hold_and_compute_what_one_does(tmp_path):
    for family in FAMILIES:
        save(transformers_model(family), tmp_path / family)
    ranks = run_world(ranks_logits, 2, str(tmp_path))
    for family in FAMILIES:
        alone = load(tmp_path / family)
        expected, whole = logits(alone.module), held(alone)
        for rank in ranks:
            difference = rank[family]["logits"] - expected
            assert difference.abs().max() <= 1e-6 * expected.abs().max(), family
        seen = ranks[0][family]["tensors"] | ranks[1][family]["tensors"]
        assert seen.keys() == whole.keys()
        assert all(torch.equal(seen[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_does_not_read_the_experts_of_another(family, tmp_path):
    """The upper experts lie in a file of noise: a rank that holds the lower ones never sees it."""
    save(transformers_model(family), tmp_path)
    tensors = saved(tmp_path)
    upper = {n: t for n, t in tensors.items() if any(f".experts.{e}." in n for e in range(4, 8))}
    save_file({n: t for n, t in tensors.items() if n not in upper}, tmp_path / "low.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "high.safetensors").write_bytes(b"noise")
    weight_map = {n: "high.safetensors" if n in upper else "low.safetensors" for n in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model = load(tmp_path, ParallelDims(data=1, expert=2, rank=0, expert_group=None))
    for name, tensor in held(model).items():
        assert torch.equal(tensor, tensors[name]), name
    with pytest.raises(ValueError, match=r"^.*high\.safetensors cannot be read: .*$"):
        load(tmp_path, ParallelDims(data=1, expert=2, rank=1, expert_group=None))


def test_a_router_of_another_family_brings_its_bias_out_and_in(tmp_path):
    save(transformers_model("qwen3_moe"), tmp_path / "in")
    config = ModelConfig(path=str(tmp_path / "in"), router="sigmoid_bias")
    model = build_model(config, hf_config(config, {}), ALONE, seed=0)
    for bias_E in model.buffers().values():
        assert not bias_E.any()
        bias_E += torch.rand(8)
    export_hf(tmp_path / "out", model.config, held(model))
    config = ModelConfig(path=str(tmp_path / "out"), router="sigmoid_bias")
    again = build_model(config, hf_config(config, {}), ALONE, seed=0)
    assert len(model.buffers()) == 2 and held(again).keys() == held(model).keys()
    assert all(torch.equal(t, held(again)[name]) for name, t in held(model).items())


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("no_shard", r"model-00001-of-.*\.safetensors is missing; model.safetensors.index.json"),
        ("no_tensor", r"lacks model\.norm\.weight and 0 more tensors"),
        ("strange", r"holds, and the model does not, strange\.weight"),
        ("shape", r"holds model\.norm\.weight of shape \(9,\); the config says \(32,\)"),
        ("fp8", r"norm\.weight is torch\.float8_e4m3fn in its file; expected bfloat16 or wider"),
        ("elsewhere", r"index\.json names \.\./x\.safetensors; expected files beside it"),
        ("nothing", r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
        ("quantised", r"model is quantised"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_a_sentence(fault, expected, tmp_path):
    save(transformers_model("mixtral"), tmp_path, "60KB" if fault == "no_shard" else "5GB")
    path = tmp_path / "model.safetensors"
    if fault == "no_shard":
        next(tmp_path.glob("model-00001-of-*")).unlink()
    elif fault == "elsewhere":
        index = {"weight_map": {"model.norm.weight": "../x.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif fault == "nothing":
        path.unlink()
    elif fault == "quantised":
        fields = json.loads((tmp_path / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "fp8"}
        (tmp_path / "config.json").write_text(json.dumps(fields))
    else:
        tensors = load_file(path)
        norm = tensors.pop("model.norm.weight")
        changed = {
            "no_tensor": {},
            "strange": {"strange.weight": norm, "model.norm.weight": norm.clone()},
            "shape": {"model.norm.weight": torch.zeros(9)},
            "fp8": {"model.norm.weight": norm.to(torch.float8_e4m3fn)},
        }[fault]
        save_file(tensors | changed, path)
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 350


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; expected 0"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu; .* expected silu"),
    ],
)
def test_what_our_block_cannot_do_is_refused(fields, expected):
    config = ModelConfig(hf={**hf_fields("mixtral"), **fields})
    with pytest.raises(ValueError, match=expected):
        build_model(config, hf_config(config, {}), ALONE, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_built_from_its_config_keeps_the_names(family):
    config = ModelConfig(hf=hf_fields(family))
    model = build_model(config, hf_config(config, {}), ALONE, seed=0)
    theirs = transformers_model(family)
    names = {name for name, _ in theirs.named_parameters()}
    assert {name for name, _ in model.module.named_parameters()} == names
    assert model.module.state_dict().keys() == theirs.state_dict().keys()
