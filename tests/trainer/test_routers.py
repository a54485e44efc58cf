"""Each router against a plain loop over tokens, and by hand. Top-k softmax: test_router.py."""

import math

import pytest
import torch
from gossamer.trainer.moe.config import DenseToSparseConfig, GrowingKConfig, MoEConfig
from gossamer.trainer.moe.router import RouterSpec
from gossamer.trainer.moe.routers.dense_to_sparse import (
    DenseToSparseRouter,
    gumbel,
    temperature_at,
)
from gossamer.trainer.moe.routers.sigmoid_bias import SigmoidBiasRouter
from gossamer.trainer.moe.routers.smoe_dropout import SMoEDropoutRouter, k_at
from gossamer.trainer.moe.routers.topk_softmax import TopKSoftmaxRouter
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

E, D = 8, 6
ONE = torch.ones(1, 1, dtype=torch.float64)
TOKEN_T = torch.arange(40)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def logits_as_weight(*logits: float) -> torch.Tensor:
    """[E, 1]: what a token whose only feature is 1 gets as logits."""
    return torch.tensor(logits, dtype=torch.float64).unsqueeze(1)


def odds(*numbers: float) -> torch.Tensor:
    return logits_as_weight(*(math.log(n) for n in numbers))


# --- top-k softmax, softmax last ----------------------------------------------------------------


def test_softmax_after_topk_by_hand():
    spec = RouterSpec(top_k=2, moe=MoEConfig(softmax_after_topk=True))
    routing = TopKSoftmaxRouter(odds(1, 2, 5, 3), spec)(ONE, TOKEN_T[:1])
    assert routing.expert_TK.tolist() == [[2, 3]]
    assert routing.weight_TK[0].tolist() == pytest.approx([5 / 8, 3 / 8])
    assert routing.probability_TE[0].tolist() == pytest.approx([1 / 11, 2 / 11, 5 / 11, 3 / 11])


# --- sigmoid with a bias, in groups -------------------------------------------------------------


def sigmoid_router(weight_ED: torch.Tensor, bias: list[float], **fields) -> SigmoidBiasRouter:
    bias_E = torch.tensor(bias)
    return SigmoidBiasRouter(weight_ED, RouterSpec(bias_E=bias_E, **fields))


def test_the_bias_chooses_and_does_not_weigh():
    # sigmoids 1/2, 2/3, 3/4, 1/4
    weight = odds(1, 2, 3, 1 / 3)
    routing = sigmoid_router(weight, [0.0, 0.0, 0.0, 0.6], top_k=2, scale=2.5)(ONE, TOKEN_T[:1])
    assert routing.expert_TK.tolist() == [[3, 2]]  # 0.85, 0.75
    assert routing.weight_TK[0].tolist() == pytest.approx([2.5 / 4, 2.5 * 3 / 4])
    renormalised = sigmoid_router(weight, [0.0, 0.0, 0.0, 0.6], top_k=2, is_renormalised=True)
    assert renormalised(ONE, TOKEN_T[:1]).weight_TK[0].tolist() == pytest.approx([0.25, 0.75])


def test_groups_by_hand():
    """Sigmoids .9 .1 | .6 .6: the second group has the better pair, so 0.9 is out of the choice."""
    weight = odds(9, 1 / 9, 1.5, 1.5)
    router = sigmoid_router(weight, [0.0] * 4, top_k=2, num_groups=2, top_groups=1)
    assert set(router(ONE, TOKEN_T[:1]).expert_TK[0].tolist()) == {2, 3}


@pytest.mark.parametrize("is_renormalised", [True, False])
@pytest.mark.parametrize(("num_groups", "top_groups", "top_k"), [(1, 1, 3), (4, 2, 3), (2, 1, 4)])
def test_groups_as_transformers_computes_them(num_groups, top_groups, top_k, is_renormalised):
    config = DeepseekV3Config(
        hidden_size=D, n_routed_experts=E, num_local_experts=E, num_experts_per_tok=top_k,
        n_group=num_groups, topk_group=top_groups, routed_scaling_factor=1.7,
        norm_topk_prob=is_renormalised,
    )  # fmt: skip
    theirs, weight = DeepseekV3TopkRouter(config), random(E, D).float()
    bias_E = 0.3 * random(E).float()
    theirs.weight.data, theirs.e_score_correction_bias.data = weight, bias_E
    x_TD = random(40, D).float()
    logits, weights, experts = theirs(x_TD)
    ours = SigmoidBiasRouter(
        weight,
        RouterSpec(
            top_k=top_k,
            is_renormalised=is_renormalised,
            scale=1.7,
            num_groups=num_groups,
            top_groups=top_groups,
            bias_E=bias_E,
        ),
    )(x_TD, TOKEN_T)
    assert torch.equal(ours.logits_TE, logits)
    order, our_order = experts.argsort(1), ours.expert_TK.argsort(1)
    assert torch.equal(experts.gather(1, order), ours.expert_TK.gather(1, our_order))
    mine, expected = ours.weight_TK.gather(1, our_order), weights.gather(1, order)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)


def test_the_bias_moves_once_a_step_against_the_load():
    router = sigmoid_router(random(4, D), [0.0, 0.5, 0.0, 0.0], top_k=1)
    router.end_step(torch.tensor([10, 2, 0, 4]))  # mean 4
    assert router.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0.501, 0.001, 0.0])
    router.end_step(torch.tensor([0, 0, 0, 0]))
    assert router.e_score_correction_bias.tolist() == pytest.approx([-0.001, 0.501, 0.001, 0.0])


def test_a_cast_to_bfloat16_keeps_the_bits_of_the_bias():
    router = sigmoid_router(random(2, D), [0.001234567, -1.0], top_k=1)
    before = router.e_score_correction_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, before)
    assert torch.equal(router.state_dict()["e_score_correction_bias"], before)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_k": 2, "num_groups": 3}, "n_group=3 and topk_group=1 for 8 experts"),
        ({"top_k": 2, "num_groups": 2, "top_groups": 3}, "at most that many groups"),
        ({"top_k": 5, "num_groups": 2}, "num_experts_per_tok=5; expected at most the 4"),
    ],
)
def test_groups_that_cannot_be_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SigmoidBiasRouter(random(E, D), RouterSpec(**fields))


# --- EvoMoE -------------------------------------------------------------------------------------


def evomoe(weight_ED: torch.Tensor, top_k: int = 1, **fields) -> DenseToSparseRouter:
    moe = MoEConfig(dense_to_sparse=DenseToSparseConfig(**fields))
    return DenseToSparseRouter(weight_ED, RouterSpec(top_k=top_k, layer=1, seed=2, moe=moe))


def test_the_temperature_by_hand():
    config = {"max_temperature": 4.0, "min_temperature": 1.0, "decay_steps": 10}
    falling = DenseToSparseConfig(**config)
    found = [temperature_at(step, falling) for step in (0, 5, 10, 99)]
    assert found == pytest.approx([4.0, 2.0, 1.0, 1.0])
    linear = DenseToSparseConfig(**config, decay="linear")
    assert temperature_at(5, linear) == pytest.approx(2.5)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 30.0])
def test_the_soft_gate_is_a_gumbel_softmax_above_a_threshold(temperature):
    weight, x_TD = random(E, D), random(40, D)
    router = evomoe(
        weight, max_temperature=temperature, min_temperature=0.1, decay_steps=9, threshold=0.02
    )
    routing = router(x_TD, TOKEN_T)
    noise_TE = gumbel("2/0/1", TOKEN_T, E)
    for t in range(40):
        raised = [
            math.exp((float(weight[e] @ x_TD[t]) + float(noise_TE[t, e])) / temperature)
            for e in range(E)
        ]
        gate = [r / sum(raised) for r in raised]
        used = sorted((e for e in range(E) if gate[e] > 0.02), key=lambda e: -gate[e])
        mine = routing.is_used_TK[t]
        assert routing.expert_TK[t][mine].tolist() == used
        assert routing.weight_TK[t][mine].tolist() == pytest.approx([gate[e] for e in used])
        assert routing.probability_TE[t].tolist() == pytest.approx(gate)
    assert routing.expert_TK.shape[1] == int(routing.is_used_TK.sum(1).max())
    mean_used = routing.is_used_TK.sum(1).double().mean()
    assert mean_used > 7.9 if temperature == 30.0 else mean_used < 7


def test_first_one_expert_then_soft_then_top_k():
    router, x_TD = evomoe(random(E, D), top_k=2, diversify_steps=3, decay_steps=4), random(40, D)
    shapes = []
    for step in range(8):
        router.begin_step(step)
        routing = router(x_TD, TOKEN_T)
        shapes.append(routing.expert_TK.shape[1])
        if step < 3:
            assert not routing.expert_TK.any() and (routing.weight_TK == 1).all()
    assert shapes[:3] == [1, 1, 1] and min(shapes[3:7]) > 2 and shapes[7] == 2
    best = (x_TD @ router.weight.T).softmax(-1).topk(2)
    assert torch.equal(routing.expert_TK, best.indices)
    router.eval().begin_step(4)  # in evaluation without noise, whatever the step
    assert torch.equal(router(x_TD, TOKEN_T).expert_TK, best.indices)


def test_noise_is_gumbel_and_a_function_of_its_key():
    noise = gumbel("a", torch.arange(20_000), 4)
    assert torch.equal(noise[7:9], gumbel("a", torch.tensor([7, 8]), 4))
    assert not torch.equal(noise, gumbel("b", torch.arange(20_000), 4))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    correlation = torch.corrcoef(torch.cat([noise.T, noise.roll(1, 0).T]))
    assert (correlation - torch.eye(8)).abs().max() < 0.03
    share_below_0 = float((noise < 0).double().mean())
    assert share_below_0 == pytest.approx(math.exp(-1), abs=0.01)


# --- SMoE-Dropout -------------------------------------------------------------------------------


def smoe_dropout(weight_ED: torch.Tensor, **fields) -> SMoEDropoutRouter:
    moe = MoEConfig(smoe_dropout=GrowingKConfig(**fields))
    return SMoEDropoutRouter(weight_ED, RouterSpec(top_k=2, moe=moe))


def test_k_grows_by_hand():
    config = GrowingKConfig(min_k=2, max_k=6, grow_steps=8)
    assert [k_at(step, config, E) for step in (0, 1, 2, 4, 7, 8, 99)] == [2, 2, 3, 4, 6, 6, 6]
    assert k_at(10_000, GrowingKConfig(), E) == E
    assert k_at(99, config, 4) == 4  # no more than there are


def test_smoe_dropout_by_hand_at_any_k():
    router = smoe_dropout(odds(1, 2, 5, 3), min_k=1, grow_steps=3)
    weights = {
        1: [1.0],
        2: [5 / 8, 3 / 8],
        3: [5 / 10, 3 / 10, 2 / 10],
        4: [5 / 11, 3 / 11, 2 / 11, 1 / 11],
    }
    for k in weights:
        router.train().begin_step(k - 1)
        routing = router(ONE, TOKEN_T[:1])
        assert routing.expert_TK[0].tolist() == [2, 3, 1, 0][:k]
        assert routing.weight_TK[0].tolist() == pytest.approx(weights[k])
        router.eval().begin_step(0)
        router.eval_k = k
        assert router(ONE, TOKEN_T[:1]).weight_TK[0].tolist() == pytest.approx(weights[k])


def test_the_random_router_is_frozen():
    from gossamer.trainer.config import OptimConfig
    from gossamer.trainer.optim import build_adamw, decays

    router = smoe_dropout(random(E, D), min_k=3)
    before = router.weight.detach().clone()
    assert not decays("gate.weight", router.weight)
    groups = [{"params": [router.weight], "weight_decay": 0.0}]
    optimizer = build_adamw(groups, OptimConfig(weight_decay=0.1))
    optimizer.param_groups[0]["lr"] = 0.1
    router(random(40, D), TOKEN_T).weight_TK[:, 0].sum().backward()
    assert not router.weight.grad.any()
    optimizer.step()
    assert torch.equal(router.weight, before)


# --- what a config refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: MoEConfig(balance_scope="rank"), "balance_scope is rank; expected one of"),
        (lambda: MoEConfig(z_loss_coef=-1.0), "z_loss_coef is -1.0; expected 0 or more"),
        (lambda: MoEConfig(trace_steps=0), "trace_steps is 0"),
        (lambda: DenseToSparseConfig(decay="cosine"), "decay is cosine"),
        (lambda: DenseToSparseConfig(min_temperature=0.0), "min_temperature is 0.0"),
        (lambda: DenseToSparseConfig(masked_share=1.0), "masked_share is 1.0"),
        (lambda: DenseToSparseConfig(decay_steps=0), "decay_steps 0"),
        (lambda: GrowingKConfig(min_k=3, max_k=2), "min_k is 3 and max_k 2"),
        (lambda: GrowingKConfig(grow_steps=0), "grow_steps is 0"),
        (lambda: GrowingKConfig(eval_k=0), "eval_k is 0"),
    ],
)
def test_what_cannot_be_right_is_refused_by_field(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
