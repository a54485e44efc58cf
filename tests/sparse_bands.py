"""Rows of random matrices as ranks own them, and ranks as threads that sum int64 tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gossamer.trainer.sparsity.method import Band

EXPERTS = {
    f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight": shape
    for layer in range(2)
    for expert in range(3)
    for projection, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 128)))
}
ALONE = id
"""What a single rank sums with: anything that leaves the tensor as it is."""


def make_bands(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, rank: int = 0, world: int = 1):
    """What `rank` owns: 64-row bands dealt out by turns, in no order of names; rounded weights, so
    that many are equal."""
    bands = []
    for number, (name, shape) in enumerate(sorted(shapes.items(), reverse=True)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        weight = (weight * 8).round() / 8
        for index, row in enumerate(range(0, shape[0], 64)):
            if (index + number) % world == rank:
                rows = slice(row, row + 64)
                mask = torch.ones_like(weight[rows], dtype=torch.bool)
                bands.append(
                    Band(name, shape, row, weight[rows], mask, gradient[rows], gradient[rows] / 3)
                )
    return bands


def joined(bands, masks) -> dict[str, torch.Tensor]:
    """Whole masks by name, of the bands of all ranks."""
    whole = {band.name: torch.zeros(band.shape, dtype=torch.bool) for band in bands}
    for band, mask in zip(bands, masks, strict=True):
        whole[band.name][band.row_start : band.row_start + len(mask)] = mask
    return whole


def as_ranks(world: int, function: Callable[..., Any]) -> list[Any]:
    """function(rank, reduce) of every rank, each in its thread."""
    barrier, given, results = threading.Barrier(world), [None] * world, [None] * world

    def run(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> None:
            given[rank] = tensor.clone()
            barrier.wait(60)
            tensor.copy_(torch.stack(given).sum(0))
            barrier.wait(60)

        try:
            results[rank] = function(rank, reduce)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
