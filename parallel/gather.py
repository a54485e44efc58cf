"""Gathers text from all ranks as bytes in tensors: torch's own object collectives unpickle."""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_texts(text: str) -> list[str]:
    """What each rank gave, by rank, on every rank. A collective call over the whole world."""
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[dist.get_rank()] = len(mine)
    dist.all_reduce(sizes)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [bytes(g[:n].tolist()).decode() for g, n in zip(gathered, sizes.tolist(), strict=True)]
