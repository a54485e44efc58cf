"""What every Router keeps. Yours: GOSSAMER_ROUTER=my_package.mod:name pytest <this file>."""

import os

import pytest
import torch
from gossamer.trainer.import_path import resolve
from gossamer.trainer.moe.config import ROUTERS, GrowingKConfig, MoEConfig
from gossamer.trainer.moe.router import RouterSpec, Routing

NAMES = [*ROUTERS, *filter(None, [os.environ.get("GOSSAMER_ROUTER")])]
E, D, K = 8, 16, 3
TOKENS = torch.arange(100, 133)


@pytest.fixture(params=NAMES)
def build_router(request):
    return resolve(request.param, ROUTERS, "model.router")


def spec(is_renormalised: bool) -> RouterSpec:
    moe = MoEConfig(smoe_dropout=GrowingKConfig(min_k=K))
    return RouterSpec(top_k=K, is_renormalised=is_renormalised, moe=moe)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def chosen(routing: Routing) -> list[list[int]]:
    """The experts of each token, without spare slots."""
    used_TK = routing.is_used_TK
    used_TK = torch.ones_like(routing.expert_TK, dtype=bool) if used_TK is None else used_TK
    return [row[used].tolist() for row, used in zip(routing.expert_TK, used_TK, strict=True)]


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_shapes_dtypes_and_ranges(build_router, num_tokens, dtype, is_training):
    router = build_router(random(E, D, dtype=dtype), spec(True)).train(is_training)
    routing = router(random(num_tokens, D, dtype=dtype), torch.arange(num_tokens))
    assert isinstance(routing, Routing)
    num_slots = routing.expert_TK.shape[1]
    assert 1 <= num_slots <= E
    assert routing.expert_TK.shape == routing.weight_TK.shape == (num_tokens, num_slots)
    assert routing.probability_TE.shape == routing.logits_TE.shape == (num_tokens, E)
    assert routing.expert_TK.dtype == torch.int64
    wide = torch.promote_types(dtype, torch.float32)
    for tensor in (routing.weight_TK, routing.probability_TE, routing.logits_TE):
        assert tensor.dtype == wide and tensor.isfinite().all()
    assert ((routing.expert_TK >= 0) & (routing.expert_TK < E)).all()
    assert all(len(set(row)) == num_slots for row in routing.expert_TK.tolist())
    assert (routing.probability_TE >= 0).all()
    assert (routing.probability_TE.sum(-1) - 1).abs().max() < 1e-5 if num_tokens else True
    if routing.is_used_TK is not None:
        assert routing.is_used_TK[:, 0].all() and not routing.weight_TK[~routing.is_used_TK].any()


@pytest.mark.parametrize("is_training", [True, False])
def test_best_expert_first(build_router, is_training):
    router = build_router(random(E, D), spec(False)).train(is_training)
    assert (router(random(33, D), TOKENS).weight_TK.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("is_training", [True, False])
def test_a_token_is_routed_for_itself(build_router, is_training):
    """The same whatever stands beside it, so that EP and padding move no token."""
    router, x_TD = build_router(random(E, D), spec(True)).train(is_training), random(33, D)
    together = chosen(router(x_TD, TOKENS))
    shuffled = torch.randperm(33, generator=torch.Generator().manual_seed(6))
    assert chosen(router(x_TD[shuffled], TOKENS[shuffled])) == [together[t] for t in shuffled]
    alone = [chosen(router(x_TD[t : t + 1], TOKENS[t : t + 1]))[0] for t in range(33)]
    assert alone == together


def same_bits(first: Routing, second: Routing) -> bool:
    names = ("expert_TK", "weight_TK", "probability_TE", "logits_TE")
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in names)


def test_a_second_forward_pass_gives_the_same_bits_and_changes_nothing(build_router):
    router, x_TD = build_router(random(E, D), spec(True)), random(33, D)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    assert same_bits(router(x_TD, TOKENS), router(x_TD, TOKENS))
    assert all(torch.equal(before[name], tensor) for name, tensor in router.state_dict().items())


def test_a_resumed_router_goes_on_as_one_that_was_never_stopped(build_router):
    """What it does at a step follows from its saved tensors and the step's number."""
    router, x_TD = build_router(random(E, D), spec(True)), random(33, D)
    for step in range(3):
        router.begin_step(step)
        router(x_TD, TOKENS)
        router.end_step(torch.arange(E))
    resumed = build_router(random(E, D) + 1.0, spec(True))
    resumed.load_state_dict(router.state_dict())
    for each in (router, resumed):
        each.begin_step(3)
    assert same_bits(router(x_TD, TOKENS), resumed(x_TD, TOKENS))


@pytest.mark.parametrize("output", ["weight_TK", "probability_TE", "logits_TE"])
def test_gradients_reach_inputs_and_parameters(build_router, output):
    router, x_TD = build_router(random(E, D), spec(True)), random(33, D).requires_grad_()
    value = getattr(router(x_TD, TOKENS), output)
    (value * random(*value.shape)).sum().backward()
    assert x_TD.grad.isfinite().all() and x_TD.grad.any()
    for parameter in router.parameters():
        assert parameter.grad.isfinite().all()
        assert bool(parameter.grad.any()) != getattr(parameter, "is_frozen", False)


def test_the_checkpoints_weight_keeps_its_name_and_bits(build_router):
    weight_ED = random(E, D)
    held = dict(build_router(weight_ED.clone(), spec(True)).named_parameters())
    assert torch.equal(held["weight"], weight_ED)


def test_an_unknown_router_is_refused_by_field():
    with pytest.raises(ValueError, match=r"model.router is 'best'; expected one of \["):
        resolve("best", ROUTERS, "model.router")
