"""Top-k softmax: a case by hand, and a loop over tokens."""

import math

import pytest
import torch
from gossamer.trainer.moe.router import RouterSpec
from gossamer.trainer.moe.routers.topk_softmax import TopKSoftmaxRouter

# logits 0, ln 2, ln 5, ln 2: probabilities 1/10, 2/10, 5/10, 2/10
WEIGHT_ED = torch.tensor([[0.0, 9.0], [math.log(2), 9.0], [math.log(5), 9.0], [math.log(2), 0.0]])
X_TD = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])


def build(weight_ED: torch.Tensor, top_k: int, is_renormalised: bool) -> TopKSoftmaxRouter:
    return TopKSoftmaxRouter(weight_ED, RouterSpec(top_k=top_k, is_renormalised=is_renormalised))


def close(*numbers: float):
    return pytest.approx(list(numbers), rel=1e-6)


def test_by_hand():
    routing = build(WEIGHT_ED, 2, False)(X_TD, torch.arange(2))
    assert routing.probability_TE[0].tolist() == close(0.1, 0.2, 0.5, 0.2)
    # the second token's logits are negated: 1, 1/2, 1/5, 1/2 of 2.2
    assert routing.probability_TE[1].tolist() == close(1 / 2.2, 0.5 / 2.2, 0.2 / 2.2, 0.5 / 2.2)
    assert routing.expert_TK[:, 0].tolist() == [2, 0]
    assert set(routing.expert_TK[:, 1].tolist()) <= {1, 3}  # a tie
    assert routing.weight_TK.flatten().tolist() == close(0.5, 0.2, 1 / 2.2, 0.5 / 2.2)


def test_renormalised_weights_add_up_to_one():
    routing = build(WEIGHT_ED, 2, True)(X_TD, torch.arange(2))
    assert routing.weight_TK.flatten().tolist() == close(5 / 7, 2 / 7, 2 / 3, 1 / 3)
    assert routing.probability_TE[0].tolist() == close(0.1, 0.2, 0.5, 0.2)  # as they were


@pytest.mark.parametrize("top_k", [1, 3, 6])
@pytest.mark.parametrize("is_renormalised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_a_loop_over_tokens(top_k, is_renormalised, dtype):
    """bfloat16 is raised to float32 before anything is multiplied: no near-tie is decided by it."""
    generator = torch.Generator().manual_seed(4)
    x_TD = torch.randn(20, 7, generator=generator, dtype=torch.float64).to(dtype)
    weight_ED = torch.randn(6, 7, generator=generator, dtype=torch.float64).to(dtype)
    routing = build(weight_ED, top_k, is_renormalised)(x_TD, torch.arange(20))
    assert routing.weight_TK.dtype == torch.promote_types(dtype, torch.float32)
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    for t in range(20):
        odds = [math.exp(float(w.double() @ x_TD[t].double())) for w in weight_ED]
        probability = [o / sum(odds) for o in odds]
        chosen = sorted(range(6), key=lambda e: -probability[e])[:top_k]
        weight = [probability[e] for e in chosen]
        if is_renormalised:
            weight = [w / sum(weight) for w in weight]
        assert routing.expert_TK[t].tolist() == chosen
        assert routing.weight_TK[t].tolist() == pytest.approx(weight, rel=bound)
        assert routing.probability_TE[t].tolist() == pytest.approx(probability, rel=bound)


def test_huge_logits_stay_finite():
    routing = build(WEIGHT_ED * 1e4, 2, True)(X_TD, torch.arange(2))
    assert routing.weight_TK.isfinite().all() and routing.probability_TE.isfinite().all()
