"""The grouped GEMM against the loop, and the loop against matrices written out."""

import pytest
import torch
from gossamer.trainer.moe.experts import GroupedExperts, GroupedProducts, LoopProducts
from torch.nn import functional as F

COUNTS = {
    "all used": [3, 1, 4, 2],
    "some empty": [0, 5, 0, 2],
    "one takes all": [0, 0, 9, 0],
    "no row": [0, 0, 0, 0],
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_grouped_products_are_the_loop_s(dtype, counts):
    """Rows, and weights; those of an expert without rows are 0, not left out."""
    count_e = torch.tensor(counts)
    x_RI, y_RO = random(sum(counts), 16, dtype=dtype), random(sum(counts), 24, dtype=dtype, seed=2)
    w_eOI = random(4, 24, 16, dtype=dtype, seed=1)
    grouped, loop = GroupedProducts(count_e), LoopProducts(count_e)
    for found, expected in (
        (grouped.rows(x_RI, w_eOI.mT), loop.rows(x_RI, w_eOI.mT)),
        (grouped.rows(y_RO, w_eOI), loop.rows(y_RO, w_eOI)),
        (grouped.weights(y_RO, x_RI), loop.weights(y_RO, x_RI)),
    ):
        assert found.dtype == dtype and found.shape == expected.shape
        difference = (found.double() - expected.double()).norm()
        assert difference <= TOLERANCE[dtype] * expected.double().norm()
    assert [bool(w.any()) for w in grouped.weights(y_RO, x_RI)] == [n > 0 for n in counts]


def test_the_loop_by_hand():
    x_RI = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    w_eOI = torch.tensor([[[1.0, 0.0]], [[9.0, 9.0]], [[0.0, 1.0]]])
    loop = LoopProducts(torch.tensor([2, 0, 1]))
    assert loop.rows(x_RI, w_eOI.mT).tolist() == [[1.0], [3.0], [6.0]]
    weights = loop.weights(torch.tensor([[1.0], [10.0], [2.0]]), x_RI)
    assert weights.tolist() == [[[31.0, 42.0]], [[0.0, 0.0]], [[10.0, 12.0]]]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_gradients_are_those_of_finite_differences(counts):
    shapes = ((sum(counts), 6), (4, 8, 6), (4, 6, 4))
    given = [random(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes)]

    def apply(x_RD, gate_up_eFD, down_eDF):
        experts = GroupedExperts(gate_up_eFD, down_eDF)
        weights = {"gate_up_proj": gate_up_eFD, "down_proj": down_eDF}
        return torch.func.functional_call(experts, weights, (x_RD, torch.tensor(counts)))

    assert torch.autograd.gradcheck(apply, given)


def test_what_is_activated_is_not_kept():
    experts, kept = GroupedExperts(random(4, 16, 12), random(4, 12, 8)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        experts(random(10, 12).requires_grad_(), torch.tensor(COUNTS["all used"]))
    assert [shape for shape in kept if shape[0] == 10] == [(10, 12), (10, 16)]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("hidden", "width", "dtype"),
    [
        (16, 8, torch.float32),
        (16, 8, torch.bfloat16),
        (16, 8, torch.float64),
        (6, 8, torch.float32),  # rows of 24 bytes, which grouped_mm refuses
        (8, 6, torch.float32),
        (8, 4, torch.bfloat16),
    ],
)
def test_experts_are_swiglu_of_each_row(hidden, width, dtype, counts):
    """Against one row after another in float64; gate rows come first in gate_up."""
    gate_up, down = random(4, 2 * width, hidden, dtype=dtype), random(4, hidden, width, dtype=dtype)
    experts = GroupedExperts(gate_up, down)
    x_RD = random(sum(counts), hidden, dtype=dtype, seed=3)
    y_RD = experts(x_RD, torch.tensor(counts))
    expected = torch.zeros(sum(counts), hidden, dtype=torch.float64)
    of_row = [e for e, count in enumerate(counts) for _ in range(count)]
    for row, e in enumerate(of_row):
        gate, up = (gate_up[e].double() @ x_RD[row].double()).split(width)
        expected[row] = down[e].double() @ (F.silu(gate) * up)
    assert y_RD.dtype == dtype and y_RD.shape == expected.shape
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert (y_RD.double() - expected).norm() <= bound * expected.norm()
    y_RD.backward(torch.ones_like(y_RD))
    for parameter in experts.parameters():
        assert [bool(g.any()) for g in parameter.grad] == [count > 0 for count in counts]
