"""Gradient accumulation: a batch cut into uneven micro-batches is the batch in one piece.

Of router losses that holds for z and for the balance within documents. The other two scopes take
loads from what a micro-batch knows, and are compared with what that says, worked out in a loop.
"""

from dataclasses import replace

import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.dims import build_dims
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.evaluate import heldout_loss
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.moe.config import MoEConfig
from gossamer.trainer.moe.router import Routing
from gossamer.trainer.update import update
from test_equal_under_topology import HF, config_for, fixed_batch, whole_tensors

EXPERTS = HF["num_experts"]


def uneven_batch() -> TokenBatch:
    """7 rows, of which some hold few tokens."""
    tensors = [tensor.clone() for tensor in fixed_batch(7).to_tensors()]
    for tensor in tensors:
        tensor[2, 3:] = 0
        tensor[5, 5:] = 0
    return TokenBatch.from_tensors(tensors)


def first_update(expert: int, micro_rows: int, scope: str) -> dict:
    """Numbers and first moments of one update, and the losses by what its routers decided."""
    from gossamer.trainer.engine import build_engine

    config = config_for(1, expert, 1, micro_rows)
    moe = MoEConfig(balance_scope=scope, z_loss_coef=0.1)
    config = replace(config, model=ModelConfig(hf=HF, balance_loss_coef=0.1, moe=moe))
    dims = build_dims(config.parallel)
    model = build_model(config.model, hf_config(config.model, {}), dims, seed=3)
    engine = build_engine(model, dims, config.parallel, config.optim)
    routed: list[tuple[int, Routing]] = []
    for layer, block in enumerate(model.blocks):
        block.gate.register_forward_hook(
            lambda gate, inputs, output, layer=layer: routed.append((layer, output))
        )
    heldout, tokens = heldout_loss(model, dims, uneven_batch(), micro_rows)
    routed.clear()
    result = update(model, engine, dims, uneven_batch(), 1e-2, config)
    return {
        "numbers": [result.loss, result.z_loss, result.grad_norm, result.balance_loss],
        "heldout": [heldout, tokens, result.learned_tokens],
        "by_hand": balance_by_hand(routed, micro_rows, scope) if expert == 1 else 0.0,
        "rows": [
            (o.name, list(o.shape), o.row_start, o.master.clone(), o.moments["exp_avg"].clone())
            for o in engine.owned(with_moments=True)
        ],
    }


def balance_by_hand(routed: list[tuple[int, Routing]], micro_rows: int, scope: str) -> float:
    """Each micro-batch's E sum_e f_e P_e, weighted by its tokens, summed over layers."""
    is_real_BS = uneven_batch().is_real_BS
    total, seen = 0.0, torch.zeros(2, EXPERTS, dtype=torch.float64)
    for number, (layer, routing) in enumerate(routed):
        first = number // 2 * micro_rows
        is_real_T = torch.zeros(len(routing.expert_TK), dtype=torch.bool)
        here_T = is_real_BS[first : first + micro_rows].flatten()
        is_real_T[: len(here_T)] = here_T
        load_E = torch.zeros(EXPERTS, dtype=torch.float64)
        for expert in routing.expert_TK[is_real_T].flatten().tolist():
            load_E[expert] += 1
        seen[layer] += load_E
        load_E = seen[layer] if scope == "global_batch" else load_E
        mass_E = routing.probability_TE[is_real_T].double().sum(0)
        total += float(EXPERTS * (load_E / load_E.sum() * mass_E).sum() / is_real_BS.sum())
    return total


def on_one_rank() -> dict:
    found = {"whole": first_update(1, 8, "sequence")}
    return found | {scope: first_update(1, 2, scope) for scope in ("micro_batch", "global_batch")}


@pytest.fixture(scope="module")
def one() -> dict:
    return run_world(on_one_rank, 1)[0]


def test_two_ranks_with_two_uneven_micro_batches_equal_one_batch(one):
    ranks = run_world(first_update, 2, 2, 2, "sequence")
    expected = whole_tensors([one["whole"]], 4)
    for rank in ranks:
        assert rank["numbers"] == pytest.approx(one["whole"]["numbers"], rel=1e-6)
        assert rank["heldout"] == pytest.approx(one["whole"]["heldout"], rel=1e-6)
    for name, gradient in whole_tensors(ranks, 4).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_heldout_loss_is_the_loss_an_update_would_tell(one):
    for found in one.values():
        loss, tokens, learned = found["heldout"]
        assert loss == pytest.approx(found["numbers"][0], rel=1e-6) and tokens == learned


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_the_other_scopes_take_loads_from_what_is_known(one, scope):
    assert one[scope]["numbers"][:2] == pytest.approx(one["whole"]["numbers"][:2], rel=1e-6)
    assert one[scope]["numbers"][3] == pytest.approx(one[scope]["by_hand"], rel=1e-6)
    assert one["micro_batch"]["by_hand"] != pytest.approx(one["global_batch"]["by_hand"], rel=1e-3)
