"""Grouped SwiGLU experts: all local experts' matrices in two tensors, one grouped GEMM each.

The one idea: rows arrive grouped by expert, so a grouped GEMM with offsets replaces the loop; the
loop stays as the plain reference, and for what grouped_mm refuses: float64, and weights whose rows
are not multiples of 16 bytes. What lies between the two products is not kept for the backward
pass, which activates again: a pass over R x F costs less than its memory.

Shapes: R rows, D hidden, F expert width, e local experts, I in and O out of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupedExperts(nn.Module):
    """SwiGLU experts in transformers' fused layout (gate rows first, then up rows)."""

    def __init__(self, gate_up_eFD: Tensor, down_eDF: Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_eFD)
        self.down_proj = nn.Parameter(down_eDF)

    def forward(self, x_RD: Tensor, count_e: Tensor) -> Tensor:
        """x_RD: rows grouped by expert; count_e: rows of each (int64). Returns y_RD."""
        widths = (self.gate_up_proj.shape[-1], self.down_proj.shape[-1])
        is_aligned = all(width * x_RD.element_size() % 16 == 0 for width in widths)
        has_kernel = is_aligned and x_RD.dtype != torch.float64
        products = GroupedProducts(count_e) if has_kernel else LoopProducts(count_e)
        gate_up_RF = products.rows(x_RD, self.gate_up_proj.mT)
        return _ActivateDown.apply(gate_up_RF, self.down_proj, products)


class GroupedProducts:
    """Products of the rows of each expert by grouped_mm: float32, bfloat16 or float16."""

    def __init__(self, count_e: Tensor) -> None:
        self._offsets_e = count_e.cumsum(0).to(torch.int32)

    def rows(self, x_RI: Tensor, w_eIO: Tensor) -> Tensor:
        """x_RI @ w_eIO[e], e the expert of each row: y_RO."""
        return F.grouped_mm(x_RI, w_eIO, offs=self._offsets_e)

    def weights(self, y_RO: Tensor, x_RI: Tensor) -> Tensor:
        """y_RO^T @ x_RI over the rows of each expert: w_eOI; 0 for an expert without any."""
        return F.grouped_mm(y_RO.t(), x_RI, offs=self._offsets_e)


class LoopProducts:
    """The same by a plain loop over experts, any dtype."""

    def __init__(self, count_e: Tensor) -> None:
        self._counts = count_e.tolist()

    def rows(self, x_RI: Tensor, w_eIO: Tensor) -> Tensor:
        """See GroupedProducts."""
        rows = x_RI.split(self._counts)
        return torch.cat([x @ w for x, w in zip(rows, w_eIO, strict=True)])

    def weights(self, y_RO: Tensor, x_RI: Tensor) -> Tensor:
        """See GroupedProducts."""
        pairs = zip(y_RO.split(self._counts), x_RI.split(self._counts), strict=True)
        return torch.stack([y.t() @ x for y, x in pairs])


class _ActivateDown(torch.autograd.Function):
    """gate_up_RF -> (silu(gate) * up) down; a node of its own, so that the first product's input
    and this one's gradients need not be there at once."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        gate_up_RF: Tensor,
        down_eDF: Tensor,
        products: GroupedProducts | LoopProducts,
    ) -> Tensor:
        ctx.products = products  # type: ignore[attr-defined]
        ctx.save_for_backward(gate_up_RF, down_eDF)
        gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
        return products.rows(F.silu(gate_RF).mul_(up_RF), down_eDF.mT)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad_RD: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        products = ctx.products  # type: ignore[attr-defined]
        gate_up_RF, down_eDF = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_RD = grad_RD.contiguous()
        gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
        silu_RF = F.silu(gate_RF)
        grad_down_eDF = products.weights(grad_RD, silu_RF * up_RF)
        grad_RF = products.rows(grad_RD, down_eDF)
        grad_gate_up_RF = torch.empty_like(gate_up_RF)
        grad_gate_RF, grad_up_RF = grad_gate_up_RF.chunk(2, dim=-1)
        torch.mul(grad_RF, silu_RF, out=grad_up_RF)
        grad_RF *= up_RF
        torch.ops.aten.silu_backward.grad_input(grad_RF, gate_RF, grad_input=grad_gate_RF)
        return grad_gate_up_RF, grad_down_eDF, None
