"""Pseudo-gradients to measure on: made ones whose blocks differ in scale, and real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def made_gradients(side: int = 1024, spread: float = 0.7) -> dict[str, Tensor]:
    """A matrix of normal blocks of 64 by 64 whose scales are log-normal, and a vector."""
    seeded = torch.Generator().manual_seed(0)
    blocks = torch.randn(side // 64, side // 64, 64, 64, generator=seeded)
    scales = torch.exp(spread * torch.randn(side // 64, side // 64, 1, 1, generator=seeded))
    matrix = (blocks * scales).transpose(1, 2).reshape(side, side).contiguous()
    return {"matrix": 1e-3 * matrix, "vector": 1e-3 * torch.randn(10_000, generator=seeded)}


class _Characters(nn.Module):
    """Two small transformer layers over bytes."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = self.embed(tokens_BS) + self.place.weight
        for layer in self.layers:
            x_BSD = layer(x_BSD, src_mask=self.mask, is_causal=True)
        return self.head(x_BSD)


def recorded_gradients(inner_steps: int = 15, warmup_steps: int = 15) -> dict[str, Tensor]:
    """Old minus new weights of `inner_steps` of AdamW, on the source of this test suite."""
    length, seeded = 64, torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Characters(192, length)
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    text = b"".join(file.read_bytes() for file in files)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    before: dict[str, Tensor] = {}
    for step in range(warmup_steps + inner_steps):
        if step == warmup_steps:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
        starts = torch.randint(len(data) - length - 1, (8,), generator=seeded).tolist()
        batch = torch.stack([data[start : start + length + 1] for start in starts])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}
