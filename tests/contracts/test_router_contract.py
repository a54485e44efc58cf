"""What every Router keeps. Yours: GOSSAMER_ROUTER=my_package.mod:name pytest <this file>."""

import os

import pytest
import torch
from gossamer.trainer.import_path import resolve
from gossamer.trainer.moe.router import ROUTERS, RouterSpec, Routing

NAMES = [*ROUTERS, *filter(None, [os.environ.get("GOSSAMER_ROUTER")])]
E, D, K = 8, 16, 3


@pytest.fixture(params=NAMES)
def build_router(request):
    return resolve(request.param, ROUTERS, "model.router")


def spec(is_renormalised: bool) -> RouterSpec:
    return RouterSpec(top_k=K, is_renormalised=is_renormalised)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_shapes_dtypes_and_ranges(build_router, num_tokens, dtype):
    router = build_router(random(E, D, dtype=dtype), spec(True))
    routing = router(random(num_tokens, D, dtype=dtype))
    assert isinstance(routing, Routing)
    assert routing.expert_TK.shape == routing.weight_TK.shape == (num_tokens, K)
    assert routing.probability_TE.shape == (num_tokens, E)
    assert routing.expert_TK.dtype == torch.int64
    wide = torch.promote_types(dtype, torch.float32)
    assert routing.weight_TK.dtype == routing.probability_TE.dtype == wide
    assert ((routing.expert_TK >= 0) & (routing.expert_TK < E)).all()
    assert all(len(set(row)) == K for row in routing.expert_TK.tolist())  # K different experts
    assert routing.weight_TK.isfinite().all() and (routing.probability_TE >= 0).all()


def test_best_expert_first(build_router):
    routing = build_router(random(E, D), spec(False))(random(33, D))
    assert (routing.weight_TK.diff(dim=-1) <= 0).all()


def test_a_token_is_routed_for_itself(build_router):
    """The same whatever stands beside it, so that EP and padding move no token."""
    router, x_TD = build_router(random(E, D), spec(True)), random(33, D)
    together = router(x_TD)
    shuffled = torch.randperm(33, generator=torch.Generator().manual_seed(6))
    assert torch.equal(router(x_TD[shuffled]).expert_TK, together.expert_TK[shuffled])
    alone = torch.cat([router(x_D.unsqueeze(0)).expert_TK for x_D in x_TD])
    assert torch.equal(alone, together.expert_TK)


def test_twice_the_same_bits(build_router):
    router, x_TD = build_router(random(E, D), spec(True)), random(33, D)
    first, second = router(x_TD), router(x_TD)
    for name in ("expert_TK", "weight_TK", "probability_TE"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("output", ["weight_TK", "probability_TE"])
def test_gradients_reach_inputs_and_parameters(build_router, output):
    router, x_TD = build_router(random(E, D), spec(True)), random(33, D).requires_grad_()
    value = getattr(router(x_TD), output)
    (value * random(*value.shape)).sum().backward()
    for tensor in (x_TD, *router.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.any()


def test_the_checkpoints_weight_keeps_its_name_and_bits(build_router):
    weight_ED = random(E, D)
    held = dict(build_router(weight_ED.clone(), spec(True)).named_parameters())
    assert torch.equal(held["weight"], weight_ED)


def test_an_unknown_router_is_refused_by_field():
    with pytest.raises(ValueError, match=r"model.router is 'best'; expected one of \["):
        resolve("best", ROUTERS, "model.router")
