"""The formulas of a step, each against a computation by hand."""

import math

import pytest
import torch
from gossamer.trainer.sparsity.config import FlowConfig
from gossamer.trainer.sparsity.flow import Flow, flow_at

W = torch.tensor([2.0, -0.5, 1.0, 0.25])
M = torch.tensor([True, False, True, False])
G = torch.tensor([0.1, 0.2, -0.3, -0.4])
BETAS, EPS = (0.9, 0.99), 1e-8


def stepped(flow: Flow, step: int = 1, lr: float = 0.1, weight_decay: float = 0.0):
    """(weight, first, second moment) after a step from moments of 0."""
    state = W.clone(), torch.zeros(4), torch.zeros(4)
    flow.adamw(state[0], G, state[1], state[2], M, lr, BETAS, EPS, weight_decay, step)
    return state


def test_what_the_forward_pass_takes():
    assert Flow("masked").forward(W, M).tolist() == [2.0, 0.0, 1.0, 0.0]
    assert Flow("ste").forward(W, M).tolist() == [2.0, 0.0, 1.0, 0.0]
    assert Flow("soft", keep=0.5).forward(W, M).tolist() == [2.0, -0.25, 1.0, 0.125]
    assert Flow("dense").forward(W, M).tolist() == W.tolist()


def test_sr_stes_gradient_is_the_closed_form():
    """g + lambda (1 - M) W."""
    found = Flow("ste", decay=0.1).gradient(G, W, M)
    assert found.tolist() == pytest.approx([0.1, 0.2 - 0.05, -0.3, -0.4 + 0.025])
    assert torch.equal(Flow("ste").gradient(G, W, M), G)
    assert torch.equal(Flow("ste", decay=0.1, place="decoupled").gradient(G, W, M), G)
    assert Flow("masked").gradient(G, W, M).tolist() == pytest.approx([0.1, 0.0, -0.3, 0.0])


def test_what_is_masked_may_be_nan():
    broken = torch.tensor([1.0, float("nan"), 1.0, float("inf")])
    assert Flow("masked").gradient(broken, W, M).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert Flow("ste").forward(broken, M).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_decoupled_decay_is_torchs_adamw_to_the_bit_where_nothing_is_masked():
    weight = torch.nn.Parameter(W.clone())
    adamw = torch.optim.AdamW([weight], lr=0.1, betas=BETAS, eps=EPS, foreach=False)
    mine, first, second = W.clone(), torch.zeros(4), torch.zeros(4)
    flow = Flow("ste", decay=0.3, place="decoupled")
    all_kept = torch.ones(4, dtype=torch.bool)
    for step in range(1, 4):
        weight.grad = G * step
        adamw.step()
        flow.adamw(mine, G * step, first, second, all_kept, 0.1, BETAS, EPS, 0.01, step)
        assert torch.equal(mine, weight.detach())
    assert torch.equal(first, adamw.state[weight]["exp_avg"])
    assert torch.equal(second, adamw.state[weight]["exp_avg_sq"])


def test_decoupled_decay_by_hand():
    """The first AdamW step is lr sign(g); the pull is lr lambda w besides."""
    weight, _, _ = stepped(Flow("ste", decay=0.5, place="decoupled"))
    assert weight.tolist() == pytest.approx(
        [2.0 - 0.1, -0.5 - 0.1 + 0.025, 1.0 + 0.1, 0.25 + 0.1 - 0.0125], abs=1e-6
    )


def test_an_ast_step_by_hand():
    """m = .1 g; u = m + .5 w where masked; v = .01 u^2; w -= lr (u / .1) / (|u| / 1)."""
    weight, first, second = stepped(Flow("ste", decay=0.5, place="ast"))
    assert first.tolist() == pytest.approx([0.01, 0.02, -0.03, -0.04])
    u = [0.01, 0.02 - 0.25, -0.03, -0.04 + 0.125]
    assert second.tolist() == pytest.approx([0.01 * x * x for x in u])
    # u / (1 - b1) over sqrt(v / (1 - b2)) = |u|
    expected = [w - 0.1 * math.copysign(10.0, x) for w, x in zip(W.tolist(), u, strict=True)]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_adams_step_by_hand():
    """CAST: masked, (1 - a) m + a lambda sign(w); the kept moment is m."""
    weight, first, second = stepped(Flow("dense", decay=0.5, place="adams", mix=0.25))
    assert first.tolist() == pytest.approx([0.01, 0.02, -0.03, -0.04])
    u = [0.01, 0.75 * 0.02 - 0.125, -0.03, 0.75 * -0.04 + 0.125]
    assert second.tolist() == pytest.approx([0.01 * x * x for x in u])
    expected = [w - 0.1 * math.copysign(10.0, x) for w, x in zip(W.tolist(), u, strict=True)]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_pull_takes_masked_weights_to_zero_and_leaves_the_kept():
    """As with the public `~mask` of an int mask it would not: -2 and -1 pull both, and away."""
    for place in ("decoupled", "ast", "adams"):
        weight, first, second = W.clone(), torch.zeros(4), torch.zeros(4)
        flow = Flow("ste", decay=0.5, place=place, mix=1.0)
        for step in range(1, 300):
            flow.adamw(weight, 0 * G, first, second, M, 0.01, BETAS, EPS, 0.0, step)
        assert weight[M].tolist() == W[M].tolist()
        assert (weight[~M].abs() < 0.6 * W[~M].abs()).all()


def test_numbers_of_a_flow_over_the_run():
    ramp = FlowConfig(kind="ste", decay=0.4, ramp=0.25)
    found = [flow_at(ramp, number, 1000, 0.5).decay for number in (1, 125, 250, 900)]
    assert found == pytest.approx([0.4 / 250, 0.2, 0.4, 0.4])
    cast = FlowConfig(kind="dense", decay=0.4, decay_place="adams", ramp=1.0)
    assert flow_at(cast, 500, 1000, 0.5) == Flow("dense", 0.0, 0.4, "adams", mix=0.5)
    linear = FlowConfig(kind="soft", rate=2.0)
    shares = (-1.0, 0.0, 0.25, 0.75, 1.0)
    assert [flow_at(linear, 1, 10, u).keep for u in shares] == [1.0, 1.0, 0.5, 0.0, 0.0]
    falls = FlowConfig(kind="soft", softening="exponential", rate=2.0)
    found = [flow_at(falls, 1, 10, u).keep for u in shares]
    assert found == pytest.approx([1.0, 1.0, math.exp(-0.5), math.exp(-1.5), 0.0])
