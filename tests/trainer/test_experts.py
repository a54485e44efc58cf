"""The grouped GEMM against the loop, and the loop against matrices written out."""

import pytest
import torch
from gossamer.trainer.moe.experts import GroupedExperts, grouped_matmul, loop_matmul
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


def forward_backward(multiply, x_RI, w_eOI, count_e) -> tuple[torch.Tensor, ...]:
    x, w = x_RI.clone().requires_grad_(), w_eOI.clone().requires_grad_()
    y = multiply(x, w, count_e)
    y.backward(random(*y.shape, dtype=y.dtype, seed=9))
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_grouped_is_the_loop(dtype, counts):
    """Output and both gradients; an expert without rows has a gradient of zero, not none."""
    count_e = torch.tensor(counts)
    x, w = random(sum(counts), 16, dtype=dtype), random(4, 24, 16, dtype=dtype, seed=1)
    grouped = forward_backward(grouped_matmul, x, w, count_e)
    for found, expected in zip(grouped, forward_backward(loop_matmul, x, w, count_e), strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        difference = (found.double() - expected.double()).norm()
        assert difference <= TOLERANCE[dtype] * expected.double().norm()
    assert [bool(g.any()) for g in grouped[2]] == [count > 0 for count in counts]


def test_the_loop_by_hand():
    x_RI = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    w_eOI = torch.tensor([[[1.0, 0.0]], [[9.0, 9.0]], [[0.0, 1.0]]])
    y = loop_matmul(x_RI, w_eOI, torch.tensor([2, 0, 1]))
    assert y.tolist() == [[1.0], [3.0], [6.0]]


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
