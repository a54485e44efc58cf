"""Times the products that sparsity could make shorter, and changes of masks, on this machine.

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
from gossamer.trainer.sparsity.method import Band, Horizon, Point
from gossamer.trainer.sparsity.plan import SparsityPlan
from gossamer.trainer.sparsity.recipes import RECIPES

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


def time_changes(quick: bool) -> list[dict[str, Any]]:
    """Seconds of one change of masks of a million weights, one thread and rank, beside torch's
    topk over as many."""
    columns, times = (64, 1) if quick else (2048, 5)
    shapes = {f"layers.{layer}.x_proj.weight": (1024, columns) for layer in range(4)}
    generator = torch.Generator().manual_seed(1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    millions = sum(weight.numel() for weight in weights.values()) / 1e6
    rows: list[dict[str, Any]] = []
    for name in ("gmp", "journey", "rigl", "ste"):
        plan = SparsityPlan(RECIPES[name])
        plan.begin(shapes, Horizon(1000))
        bands = [
            Band(n, shapes[n], 0, w, torch.ones_like(w, dtype=torch.bool), w.roll(1))
            for n, w in weights.items()
        ]
        for band, mask in zip(bands, plan.update(bands, Point(0), id), strict=True):
            band.mask_RC = mask
        took = _time_s(partial(plan.update, bands, Point(300), id), times)
        rows.append({"change": name, "seconds": took / millions})
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    took = _time_s(partial(torch.topk, flat, len(flat) // 5, sorted=False), times)
    torch.set_num_threads(before)
    return [*rows, {"change": "torch.topk", "seconds": took / millions}]


def _time_s(run: Callable[[], object], times: int) -> float:
    run()
    took = []
    for _ in range(times):
        start_s = time.perf_counter()
        run()
        took.append(time.perf_counter() - start_s)
    return median(took)
