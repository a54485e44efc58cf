"""Dispatch, experts and combine under EP 1, 2 and 4 against a loop over tokens, in float64.

One world of four ranks runs every case; each has tokens of its own, rank 1 has none. Sums of the
ranks' gradients are those of one rank that holds all tokens.
"""

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from gossamer.parallel.dims import ParallelDims, build_dims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.parallel.route import Pairs
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.router import RouterSpec, Routing
from gossamer.trainer.moe.routers.topk_softmax import TopKSoftmaxRouter
from torch import Tensor, nn

D, F, E, K = 5, 3, 8, 3
TOKENS = (6, 0, 9, 4)
"""Of each rank."""
BALANCE_COEF = 0.7
TOPOLOGIES = {"EP=1": (4, 1), "EP=2": (2, 2), "EP=4": (1, 4), "EP=4 on 2 nodes": (1, 4)}


class FirstExpertsRouter(TopKSoftmaxRouter):
    """Every token goes to experts 0, 1, 2: with EP=4 the last two ranks are sent nothing."""

    def forward(self, x_TD: Tensor, token_T: Tensor) -> Routing:
        probability_TE = (x_TD @ self.weight.T).softmax(-1)
        expert_TK = torch.arange(K).expand(len(x_TD), K)
        weight_TK = probability_TE.gather(1, expert_TK)
        return Routing(expert_TK, weight_TK, probability_TE, probability_TE.log())


CASES = {
    "topk": (TopKSoftmaxRouter, TOKENS),
    "forced": (FirstExpertsRouter, TOKENS),
    "no token anywhere": (TopKSoftmaxRouter, (0, 0, 0, 0)),
}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate": (E, D), "gate_up": (E, 2 * F, D), "down": (E, D, F)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient of the output, and which tokens are real."""
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(2, num_tokens, D, generator=generator, dtype=torch.float64).unbind()
    return x, dy, torch.arange(num_tokens) % 4 != 1


def block_on_this_rank(router: type[nn.Module], dims: ParallelDims, context: StepContext):
    given = weights()
    mine = dims.local_experts(E)
    local = slice(mine.start, mine.stop)
    experts = GroupedExperts(given["gate_up"][local].clone(), given["down"][local].clone())
    gate = router(given["gate"], RouterSpec(top_k=K, is_renormalised=True))
    return MoEBlock(gate, experts, Dispatcher(dims, E), context, True)


def forward_backward(router: type[nn.Module], tokens: tuple[int, ...], dims: ParallelDims) -> dict:
    x_TD, dy_TD, is_real_T = inputs(sum(tokens))
    first = sum(tokens[: dims.rank])
    mine = slice(first, first + tokens[dims.rank])
    block = block_on_this_rank(router, dims, StepContext(is_real_T=is_real_T[mine]))
    x = x_TD[mine].clone().requires_grad_()
    y = block(x.unsqueeze(0)).squeeze(0)
    balance = block.statistics.balance_loss
    ((y * dy_TD[mine]).sum() + BALANCE_COEF * balance).backward()

    local = {"gate_up": block.experts.gate_up_proj.grad, "down": block.experts.down_proj.grad}
    summed = {"gate": block.gate.weight.grad.clone(), "balance": balance.detach().clone()}
    held = dims.local_experts(E)
    for name, gradient in local.items():
        summed[name] = torch.zeros(E, *gradient.shape[1:], dtype=torch.float64)
        summed[name][held.start : held.stop] = gradient
    for tensor in summed.values():
        dist.all_reduce(tensor)
    count_E = block.statistics.count_E
    return {**summed, "y": y.detach(), "x": x.grad, "count": count_E, "local_down": local["down"]}


def dispatched(dims: ParallelDims) -> dict:
    """What each rank's experts are sent when a token is its own number, and what comes home."""
    first = sum(TOKENS[: dims.rank])
    x_TD = torch.arange(first, first + TOKENS[dims.rank]).double().unsqueeze(1)
    dispatcher = Dispatcher(dims, E)
    x_RD, count_e, route = dispatcher.dispatch(x_TD, choices()[first : first + len(x_TD)])
    factor_R = torch.arange(dims.local_experts(E).start, dims.local_experts(E).stop)
    y_RD = x_RD * (factor_R + 1).repeat_interleave(count_e).unsqueeze(1)
    slots_KK = torch.eye(K, dtype=torch.float64)  # a weight of 1 for one slot brings its row
    home = [dispatcher.combine(y_RD, row_K.expand(len(x_TD), K), route) for row_K in slots_KK]
    return {
        "rows": x_RD,
        "count": count_e,
        "home": torch.stack(home, 1),
        "experts": list(dims.local_experts(E)),
    }


def choices() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(sum(TOKENS), E, generator=generator).topk(K).indices


def every_case() -> dict:
    results = {}
    for name, (data, expert) in TOPOLOGIES.items():
        nodes = DispatchConfig(levels=2, ranks_per_node=2)
        how = nodes if name.endswith("nodes") else DispatchConfig()
        dims = build_dims(ParallelConfig(data=data, expert=expert, dispatch=how))
        group = dims.expert_group
        results[name] = {case: forward_backward(*CASES[case], dims) for case in CASES}
        results[name]["dispatched"] = dispatched(dims)
        results[name]["group"] = dist.get_process_group_ranks(group) if group else None
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_world(every_case, 4)


def plain_block(router: type[nn.Module], tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """Token by token, slot by slot; the balance loss from its formula E * sum_e f_e P_e."""
    leaf = {name: tensor.requires_grad_() for name, tensor in weights().items()}
    x_TD, dy_TD, is_real_T = inputs(sum(tokens))
    x_TD.requires_grad_()
    probability_TE = torch.softmax(x_TD @ leaf["gate"].T, dim=-1)
    rows, count_E = [], torch.zeros(E, dtype=torch.int64)
    for t in range(len(x_TD)):
        chosen = probability_TE[t].argsort(descending=True)[:K].tolist()
        share = probability_TE[t, chosen] / probability_TE[t, chosen].sum()
        if router is FirstExpertsRouter:
            chosen, share = list(range(K)), probability_TE[t, :K]
        total = torch.zeros(D, dtype=torch.float64)
        for e, weight in zip(chosen, share, strict=True):
            gate, up = leaf["gate_up"][e, :F] @ x_TD[t], leaf["gate_up"][e, F:] @ x_TD[t]
            total = total + weight * (leaf["down"][e] @ (gate * gate.sigmoid() * up))
            count_E[e] += int(is_real_T[t])
        rows.append(total)
    y_TD = torch.stack(rows)
    num_real = int(is_real_T.sum())
    f_E, p_E = count_E.double() / (num_real * K), probability_TE[is_real_T].sum(0) / num_real
    balance = E * (f_E * p_E).sum()
    ((y_TD * dy_TD).sum() + BALANCE_COEF * balance).backward()
    grads = {name: tensor.grad for name, tensor in leaf.items()}
    detached = {"y": y_TD.detach(), "balance": balance.detach(), "count": count_E}
    return {**grads, **detached, "x": x_TD.grad}


@pytest.mark.parametrize("case", ["topk", "forced"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_outputs_and_gradients_are_those_of_one_rank_with_all_tokens(ranks, topology, case):
    expected, found = plain_block(*CASES[case]), [rank[topology][case] for rank in ranks]
    for name in ("y", "x"):  # one rank's tokens after another's
        whole = torch.cat([rank[name] for rank in found])
        assert (whole - expected[name]).abs().max() <= 1e-12, name
    for name in ("gate", "gate_up", "down", "balance"):
        for rank in found:
            difference = (rank[name] - expected[name]).norm()
            assert difference <= 1e-12 * expected[name].norm(), (name, difference)
    assert torch.equal(sum(rank["count"] for rank in found), expected["count"])


def test_the_reference_is_not_trivial():
    expected = plain_block(*CASES["topk"])
    gradients = [expected[name] for name in ("gate", "gate_up", "down", "x")]
    assert all((gradient != 0).any(-1).all() for gradient in gradients)
    assert expected["balance"] > 1.0


def test_experts_without_a_token_have_gradients_of_zero(ranks):
    """Forced to experts 0..2 of 8: with EP=4 ranks 2 and 3 are sent nothing, yet all take part."""
    for rank, found in enumerate(ranks):
        gradient = found["EP=4"]["forced"]["local_down"]
        idle = gradient[max(0, K - 2 * rank) :]
        assert gradient.shape == (2, D, F)
        assert torch.equal(idle, torch.zeros_like(idle))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_no_token_anywhere_gives_zeros(ranks, topology):
    for rank in ranks:
        found = rank[topology]["no token anywhere"]
        assert found["y"].shape == found["x"].shape == (0, D)
        for name in ("gate", "gate_up", "down", "balance", "count"):
            assert torch.equal(found[name], torch.zeros_like(found[name])), name


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rows_of_an_expert_lie_as_one_rank_would_lay_them(ranks, topology):
    """In the order (source rank, token, slot), over the ranks that share a set of experts."""
    expert = TOPOLOGIES[topology][1]
    chosen = choices().tolist()
    for rank, found in enumerate(ranks):
        peers = range(rank - rank % expert, rank - rank % expert + expert)
        tokens = range(sum(TOKENS[: peers[0]]), sum(TOKENS[: peers[-1] + 1]))
        sent = [[t for t in tokens for c in chosen[t] if c == e] for e in range(E)]
        place = found[topology]["dispatched"]
        first = E // expert * (rank % expert)
        assert place["experts"] == list(range(first, first + E // expert))
        assert place["count"].tolist() == [len(sent[e]) for e in place["experts"]]
        assert place["rows"].flatten().tolist() == sum([sent[e] for e in place["experts"]], [])


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_results_come_home_in_slot_order(ranks, topology):
    """Expert e multiplied by e + 1."""
    home = torch.cat([rank[topology]["dispatched"]["home"] for rank in ranks]).squeeze(-1)
    tokens_T1 = torch.arange(sum(TOKENS)).double().unsqueeze(1)
    assert torch.equal(home, tokens_T1 * (choices() + 1))


def test_neighbours_share_one_set_of_experts(ranks):
    assert [rank["EP=1"]["group"] for rank in ranks] == [None] * 4
    assert [rank["EP=2"]["group"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["EP=4"]["group"] for rank in ranks] == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", ["all", "some", "none", "no token"])
def test_slots_are_summed_as_a_table_of_them_would_be(dtype, kept):
    """Sum, weighted sum and products of slots against [T, K, D] written out, in float64."""
    generator = torch.Generator().manual_seed(4)
    tokens = 0 if kept == "no token" else 9
    expert_TK = torch.rand(tokens, E, generator=generator).topk(K).indices
    kept_TK = None if kept == "all" else torch.rand(tokens, K, generator=generator) < 0.6
    if kept == "none":
        kept_TK = torch.zeros_like(expert_TK, dtype=torch.bool)
    pairs = Pairs(expert_TK, E, kept_TK)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    y_ND, x_TD, weight_TK = draw(len(pairs.order_N), D), draw(tokens, D), draw(tokens, K)
    table_PD = torch.zeros(tokens * K, D, dtype=torch.float64)
    table_PD[pairs.order_N] = y_ND.double()
    table_TKD = table_PD.view(tokens, K, D)
    for found, expected in (
        (pairs.sum_slots(y_ND), table_TKD.sum(1)),
        (pairs.sum_slots(y_ND, weight_TK), (table_TKD * weight_TK.double().unsqueeze(-1)).sum(1)),
        (pairs.slot_products(x_TD, y_ND), (table_TKD * x_TD.double().unsqueeze(1)).sum(-1)),
    ):
        assert found.dtype == dtype and found.shape == expected.shape
        bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        assert (found.double() - expected).norm() <= bound * expected.norm()
