"""Every router learns the same under any EP and DP: bias, noise, k, losses and trace included."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from gossamer.parallel.dims import ParallelDims, build_dims
from gossamer.parallel.engine import Engine
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.checkpoint import Checkpoint
from gossamer.trainer.checkpoint_writer import Target, take_snapshot, write_checkpoint
from gossamer.trainer.config import DataConfig, ModelConfig, OptimConfig, PhaseConfig, TrainConfig
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.moe.config import DenseToSparseConfig, GrowingKConfig, MoEConfig
from gossamer.trainer.moe.diversify import diversified
from gossamer.trainer.moe.trace import RoutingTrace
from gossamer.trainer.update import update

HF = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "vocab_size": 96,
    "initializer_range": 0.2,
}
CASES = {
    "sigmoid_bias": MoEConfig(balance_scope="sequence", z_loss_coef=0.01, bias_update_rate=0.01),
    "dense_to_sparse": MoEConfig(dense_to_sparse=DenseToSparseConfig(max_temperature=0.5)),
    "smoe_dropout": MoEConfig(smoe_dropout=GrowingKConfig(min_k=2, grow_steps=2)),
}
ROWS, PLACES = 8, 12


def fixed_batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(7)
    token_ids_BS = torch.randint(1, 96, (ROWS, PLACES), generator=generator)
    token_ids_BS[1, 9:] = 0  # padding
    position_ids_BS = torch.arange(PLACES).repeat(ROWS, 1)
    position_ids_BS[:, 5:] -= 5  # two documents a row
    position_ids_BS[1, 9:] = 0
    weights_BS = (token_ids_BS != 0).float()
    return TokenBatch(
        token_ids_BS=token_ids_BS, position_ids_BS=position_ids_BS, weights_BS=weights_BS
    )


def build(
    router: str, moe: MoEConfig, data: int, expert: int, capacity: float | None = None
) -> tuple:
    from gossamer.trainer.engine import build_engine

    dispatch = DispatchConfig(capacity_factor=capacity)
    config = TrainConfig(
        phases=(PhaseConfig(name="pretrain", kind="next_token", max_steps=2, lr=1e-2),),
        model=ModelConfig(hf=HF, router=router, moe=moe, balance_loss_coef=0.02),
        data=DataConfig(task_share=0.0),
        optim=OptimConfig(max_norm=0.0),
        parallel=ParallelConfig(data=data, expert=expert, dispatch=dispatch),
    )
    dims = build_dims(config.parallel)
    model = build_model(config.model, hf_config(config.model, {}), dims, seed=3)
    engine = build_engine(model, dims, config.parallel, config.optim)
    return model, engine, dims, config


def train_on(router: str, data: int, expert: int, folder: str) -> dict:
    model, engine, dims, config = build(router, CASES[router], data, expert)
    before = model.blocks[0].gate.weight.detach().clone()
    trace = RoutingTrace(Path(folder, f"{router}-{data}x{expert}"), dims.rank, 2)
    results = [
        update(model, engine, dims, fixed_batch(), 1e-2, config, trace if step < 2 else None)
        for step in range(3)
    ]
    return {
        "losses": [[r.loss, r.balance_loss, r.z_loss] for r in results],
        "norms": [r.grad_norm for r in results],
        "load": torch.tensor([r.expert_load for r in results]),
        "z": [r.layers["router_z"] for r in results],
        "bytes": results[0].layers["bytes_in_node"],
        "buffers": {name: b.clone() for name, b in model.buffers().items()},
        "gate_moved": not torch.equal(before, model.blocks[0].gate.weight),
    }


def saved(root: Path, epoch: int, engine: Engine, dims: ParallelDims) -> Checkpoint:
    target = Target(root=str(root), step=1, epoch=epoch, rank=dims.rank, world_size=dims.world_size)
    write_checkpoint(target, take_snapshot(engine.owned(with_moments=True), dims.rank), "{}")
    dist.barrier()
    return Checkpoint(target.url)


def diversify(data: int, expert: int, folder: str) -> dict:
    """Expert 0 is trained for a step, then copied; whole tensors before and after, and a loss."""
    moe = MoEConfig(dense_to_sparse=DenseToSparseConfig(diversify_steps=1, masked_share=0.25))
    model, engine, dims, config = build("dense_to_sparse", moe, data, expert)
    first = update(model, engine, dims, fixed_batch(), 1e-2, config)
    root = Path(folder, f"diversified-{data}x{expert}")
    before = saved(root, 1, engine, dims)
    engine.write(diversified(before.read, 0.25, seed=5), engine.num_updates)
    after = saved(root, 2, engine, dims)
    second = update(model, engine, dims, fixed_batch(), 1e-2, config)
    names = [name for name in before.shapes if name.startswith("model.layers.1.mlp")]
    tensors = {}
    for name in names:
        pair = [c.read(name, 0, c.shapes[name][0]) for c in (before, after)]
        tensors[name] = [pair[0].master, pair[1].master, pair[1].moments["exp_avg_sq"]]
    return {
        "loads": [first.expert_load, second.expert_load],
        "losses": [first.loss, second.loss],
        "tensors": tensors,
    }


def train_all(world_size: int, folder: str) -> dict:
    experts = [e for e in (1, 2) if world_size % e == 0]
    found = {
        router: {f"EP={e}": train_on(router, world_size // e, e, folder) for e in experts}
        for router in CASES
    }
    if world_size == 1:
        model, engine, dims, config = build("topk_softmax", MoEConfig(), 1, 1, capacity=0.5)
        found["half"] = update(model, engine, dims, fixed_batch(), 1e-2, config).layers
    return found | {"diversified": diversify(world_size // experts[-1], experts[-1], folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def reference(folder) -> dict:
    return run_world(train_all, 1, 1, str(folder))[0]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_as_on_one_rank(reference, world_size, folder):
    for rank in run_world(train_all, world_size, world_size, str(folder)):
        check_diversified(rank["diversified"], reference["diversified"])
        for router in CASES:
            expected = reference[router]["EP=1"]
            for topology, found in rank[router].items():
                where = (router, topology)
                for mine, theirs in zip(found["losses"], expected["losses"], strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-5), where
                assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), where
                assert torch.equal(found["load"], expected["load"]), where
                assert [n > 0 for n in found["bytes"]] == [topology == "EP=2"] * 2, where
                for mine, theirs in zip(found["z"], expected["z"], strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-5), where
                for name, buffer in found["buffers"].items():
                    assert torch.equal(buffer, expected["buffers"][name]), (where, name)
    expert = f"{world_size // 2}x2"
    one, many = (records(folder, f"sigmoid_bias-{case}") for case in ("1x1", expert))
    assert rows_of(one) == rows_of(many)


def check_diversified(found: dict, expected: dict) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["loads"] == expected["loads"]
    for name, tensors in expected["tensors"].items():
        assert torch.equal(tensors[1] == 0, found["tensors"][name][1] == 0)


def test_one_expert_becomes_all_each_with_a_mask(reference):
    found = reference["diversified"]
    tokens = ROWS * PLACES - 3
    assert found["loads"][0] == [[tokens, 0, 0, 0]] * 2
    assert all(sum(n > 0 for n in layer) > 1 for layer in found["loads"][1])
    masks = []
    for expert in range(4):
        for projection in ("gate", "up", "down"):
            name = f"model.layers.1.mlp.experts.{{}}.{projection}_proj.weight"
            trained = found["tensors"][name.format(0)][0]
            _, copy, moment = found["tensors"][name.format(expert)]
            is_kept = copy != 0
            assert torch.equal(copy, trained * is_kept)
            assert not moment[~is_kept].any() and moment[is_kept].any()
            assert float(is_kept.double().mean()) == pytest.approx(0.75, abs=0.06)
            masks.append(is_kept.flatten().tolist())
    assert len({tuple(mask) for mask in masks}) == len(masks)
    before, after, _ = found["tensors"]["model.layers.1.mlp.gate.weight"]
    assert torch.equal(before, after)


def test_each_case_does_what_it_is_for(reference):
    found = {router: reference[router]["EP=1"] for router in CASES}
    biases = found["sigmoid_bias"]["buffers"]
    assert list(biases) == [
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (0, 1)
    ]
    load_SLE = found["sigmoid_bias"]["load"].double()
    moves_LE = 0.01 * torch.sign(load_SLE.mean(-1, keepdim=True) - load_SLE).sum(0)
    torch.testing.assert_close(
        torch.stack(list(biases.values())), moves_LE.float(), rtol=1e-5, atol=0
    )
    assert all(z > 0 for _, _, z in found["sigmoid_bias"]["losses"])
    assert [found[router]["gate_moved"] for router in CASES] == [True, True, False]
    tokens = ROWS * PLACES - 3
    assert found["smoe_dropout"]["load"].sum(-1).tolist() == [[k * tokens] * 2 for k in (2, 3, 4)]
    assert (found["dense_to_sparse"]["load"].sum(-1) < 4 * tokens).all()


def test_the_share_of_dropped_pairs(reference):
    """Half of all pairs, padding included, find a place at most; padding comes last."""
    pairs, places = 2 * (ROWS * PLACES - 3), 4 * ROWS * PLACES // 4
    for share in reference["half"]["dropped_share"]:
        assert 1 - places / pairs - 1e-9 <= share < 0.8


def records(folder: Path, case: str) -> list[dict]:
    paths = sorted((folder / case).iterdir())
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def rows_of(found: list[dict]) -> dict:
    """(step, layer) -> top_indices of all ranks, one rank's after another's."""
    rows: dict = {}
    for record in found:
        rows.setdefault((record["step"], record["layer"]), []).extend(record["top_indices"])
    return rows


def test_the_trace_has_megatrons_fields(reference, folder):
    found = records(folder, "sigmoid_bias-1x1")
    assert [(r["step"], r["layer"]) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    fields = "step stage block layer rank num_tokens topk top_indices".split()
    for record in found:
        assert list(record) == fields
        assert (record["stage"], record["block"], record["rank"]) == ("pre_dispatch", "decoder", 0)
        assert record["num_tokens"] == len(record["top_indices"]) == ROWS * PLACES - 3
        assert record["topk"] == 2 and all(len(row) == 2 for row in record["top_indices"])
    counts = torch.bincount(torch.tensor(found[1]["top_indices"]).flatten(), minlength=4)
    assert torch.equal(counts, reference["sigmoid_bias"]["EP=1"]["load"][0, 1])
