"""Grouped SwiGLU experts: all local experts' matrices in two tensors, one grouped GEMM each.

The one idea: rows arrive grouped by expert, so a grouped GEMM with offsets replaces the loop; the
loop stays as the plain reference, and for what grouped_mm refuses: float64, and weights whose rows
are not multiples of 16 bytes.

Shapes: R rows, D hidden, F expert width, e local experts.
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
        multiply = grouped_matmul if has_kernel else loop_matmul
        gate_RF, up_RF = multiply(x_RD, self.gate_up_proj, count_e).chunk(2, dim=-1)
        return multiply(F.silu(gate_RF) * up_RF, self.down_proj, count_e)


def grouped_matmul(x_RI: Tensor, w_eOI: Tensor, count_e: Tensor) -> Tensor:
    """y_RO = x_RI @ w_e^T for the expert of each row. float32, bfloat16 or float16."""
    offsets_e = count_e.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_RI, w_eOI.transpose(-2, -1), offs=offsets_e)


def loop_matmul(x_RI: Tensor, w_eOI: Tensor, count_e: Tensor) -> Tensor:
    """The same by a plain loop over experts, any dtype."""
    rows = x_RI.split(count_e.tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(rows, w_eOI, strict=True)])
