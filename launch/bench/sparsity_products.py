"""Times the products that sparsity could make shorter, on this machine.

The one idea: a plan saves FLOPs on paper; whether a kernel saves time is measured beside the dense
product, in the same run. Gossamer itself multiplies masked weights like all others.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)


def time_products(quick: bool) -> list[dict[str, Any]]:
    """x @ w^T of 512 tokens and a 1024 x 1024 matrix, one thread: dense; rows of zeros left out;
    as torch's CSR; in seconds, the median of a few."""
    tokens, width, times = (64, 128, 2) if quick else (512, 1024, 7)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(width, width, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for density in (1.0, *DENSITIES):
        masked = weight.where(torch.rand(weight.shape, generator=generator) < density, 0.0)
        kept = weight[: round(density * width)]
        with warnings.catch_warnings():  # torch calls CSR beta
            warnings.simplefilter("ignore")
            csr = masked.to_sparse_csr()
        found = {
            "dense": _time_s(partial(torch.mm, x_TD, masked.T), times),
            "whole rows": _time_s(partial(torch.mm, x_TD, kept.T), times),
            "csr": _time_s(partial(torch.mm, csr, x_TD.T), times),
        }
        rows += [
            {"product": name, "density": density, "seconds": took} for name, took in found.items()
        ]
    torch.set_num_threads(before)
    return rows


def _time_s(run: Callable[[], object], times: int) -> float:
    run()
    took = []
    for _ in range(times):
        start_s = time.perf_counter()
        run()
        took.append(time.perf_counter() - start_s)
    return median(took)
