"""Balance loss in three scopes, z-loss and loads of a block, against loops over tokens."""

import math

import pytest
import torch
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.losses import load_metrics
from gossamer.trainer.moe.router import RouterSpec
from gossamer.trainer.moe.routers.sigmoid_bias import SigmoidBiasRouter
from gossamer.trainer.moe.routers.topk_softmax import TopKSoftmaxRouter
from torch.utils.checkpoint import checkpoint

ALONE = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
E, D, F, K, B, S = 4, 6, 3, 2, 2, 8
IS_REAL_T = torch.arange(B * S) % 8 < 6
SEQUENCE_T = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 6])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def block_with(context: StepContext, router: type = TopKSoftmaxRouter) -> MoEBlock:
    gate = router(random(E, D), RouterSpec(top_k=K, is_renormalised=True))
    experts = GroupedExperts(random(E, 2 * F, D), random(E, D, F))
    return MoEBlock(gate, experts, Dispatcher(ALONE, E), context, True)


def context_with(scope: str, **fields) -> StepContext:
    given = {"is_real_T": IS_REAL_T, "sequence_T": SEQUENCE_T, "balance_scope": scope}
    return StepContext(**given, **fields)


def plain_balance(x_TD: torch.Tensor, documents: list[list[int]]) -> float:
    """Each document's E * sum_e f_e P_e, weighted by its tokens."""
    probability_TE = (x_TD @ random(E, D).T).softmax(-1)
    total = 0.0
    for tokens in documents:
        counts, means = [0] * E, [0.0] * E
        for t in tokens:
            best = sorted(range(E), key=lambda e: -float(probability_TE[t, e]))[:K]
            for e in range(E):
                counts[e] += e in best
                means[e] += float(probability_TE[t, e]) / len(tokens)
        share = [count / (len(tokens) * K) for count in counts]
        total += len(tokens) * E * sum(f * p for f, p in zip(share, means, strict=True))
    return total / sum(map(len, documents))


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_balance_against_a_loop(scope):
    x_BSD = random(B, S, D)
    block = block_with(context_with(scope))
    block(x_BSD)
    real = [t for t in range(B * S) if IS_REAL_T[t]]
    documents = [real]
    if scope == "sequence":
        documents = [[t for t in real if SEQUENCE_T[t] == q] for q in (0, 1, 4)]
    expected = plain_balance(x_BSD.flatten(0, 1), documents)
    assert block.statistics.balance_loss.item() == pytest.approx(expected, rel=1e-12)


def test_even_loads_cost_one_and_a_collapse_costs_more():
    context = StepContext(balance_scope="sequence")
    block = block_with(context)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[:, :4] = 20 * torch.eye(4)
        # documents are rows: token t of each prefers experts t % 4 and (t + 1) % 4
        even_SD = torch.zeros(S, D, dtype=torch.float64)
        for t in range(S):
            even_SD[t, t % 4] = even_SD[t, (t + 1) % 4] = 1.0
        block(even_SD.expand(B, S, D))
        assert block.statistics.balance_loss.item() == pytest.approx(1.0, rel=1e-6)
        block(even_SD[:1].expand(B, S, D))
        assert block.statistics.balance_loss.item() == pytest.approx(E / K, rel=1e-6)


def test_z_loss_by_hand():
    context = StepContext(has_z_loss=True, is_real_T=torch.tensor([True, True, False]))
    block = block_with(context)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[0, 0] = math.log(5.0)  # odds 5, 1, 1, 1: ln 8; else ln 4
    x_BSD = torch.zeros(1, 3, D, dtype=torch.float64)
    x_BSD[0, 0, 0] = 1.0
    block(x_BSD)
    expected = (math.log(8) ** 2 + math.log(4) ** 2) / 2
    assert block.statistics.z_loss.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(block.statistics.z_loss, block.gate.weight)
    # d/dz lse^2 / tokens = 2 lse softmax / tokens
    assert float(gradient[0, 0]) == pytest.approx(math.log(8) * 5 / 8)
    context.has_z_loss = False
    block(x_BSD)
    assert block.statistics.z_loss.item() == 0.0
    assert block.statistics.z_sum.item() == pytest.approx(2 * expected)


def test_a_later_micro_batch_balances_against_the_earlier_ones_too():
    """And the next step starts anew."""
    one, two = random(2, B, S, D)
    block = block_with(StepContext())
    losses = []
    for step in range(2):
        block.begin_step(step)
        for x_BSD in (one, two):
            block(x_BSD)
            losses.append(block.statistics.balance_loss.item())
            block.end_micro_batch()
    whole = block_with(StepContext())
    whole(torch.cat([one, two]))
    share_E = whole.statistics.count_E / whole.statistics.count_E.sum()
    mean_E = (two.flatten(0, 1) @ random(E, D).T).softmax(-1).mean(0)
    assert losses[1] == pytest.approx(float(E * (share_E * mean_E).sum()), rel=1e-12)
    assert losses[:2] == losses[2:]


@pytest.mark.parametrize("router", [TopKSoftmaxRouter, SigmoidBiasRouter])
def test_recompute_counts_nothing_twice(router):
    """Gradients, loads and the bias are those of a single forward pass."""
    found = []
    for is_recomputed in (False, True):
        block, x_BSD = block_with(context_with("global_batch"), router), random(B, S, D)
        x_BSD.requires_grad_()
        for step in range(2):
            block.begin_step(step)
            run = checkpoint(block, x_BSD, use_reentrant=False) if is_recomputed else block(x_BSD)
            (run.square().sum() + block.statistics.balance_loss).backward()
            block.end_micro_batch()
            block.gate.end_step(block.statistics.count_E)
        held = {**block.state_dict(), "x": x_BSD.grad, "gate": block.gate.weight.grad}
        found.append({**held, "load": block._earlier_E})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_loads_by_hand():
    metrics = load_metrics(torch.tensor([6, 2, 0, 0]))
    assert metrics["load_max_over_mean"] == pytest.approx(3.0)
    assert metrics["dead_experts"] == 2
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics["load_entropy"] == pytest.approx(entropy / math.log(4))
    assert load_metrics(torch.tensor([3, 3]))["load_entropy"] == pytest.approx(1.0)
    assert load_metrics(torch.zeros(4, dtype=torch.int64))["dead_experts"] == 4
