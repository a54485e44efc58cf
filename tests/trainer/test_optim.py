"""Learning rates by hand, and AdamW against its formula."""

import math

import pytest
import torch
from gossamer.trainer.config import OptimConfig, PhaseConfig
from gossamer.trainer.optim import build_adamw, decays, lr_at
from torch import nn


def phase(**fields) -> PhaseConfig:
    return PhaseConfig(**{"name": "p", "kind": "next_token", "max_steps": 12, "lr": 0.8, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {0: 0.8, 1: 0.8, 11: 0.8, 12: 0.8}),
        # up in quarters, and there when warm-up ends
        ({"warmup_steps": 4}, {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 0.8, 11: 0.8}),
        # then 8 steps of cosine from 0.8 to 0.2: half-way at 0.5
        (
            {"warmup_steps": 4, "final_lr_share": 0.25},
            {0: 0.2, 3: 0.8, 4: 0.8, 6: 0.5 + 0.3 * math.sqrt(0.5), 8: 0.5, 12: 0.2, 99: 0.2},
        ),
        ({"final_lr_share": 0.0}, {0: 0.8, 6: 0.4, 12: 0.0}),
        ({"warmup_steps": 12, "final_lr_share": 0.0}, {0: 0.8 / 12, 11: 0.8}),
        ({"max_steps": 1, "warmup_steps": 1}, {0: 0.8}),
        ({"schedule": "constant", "warmup_steps": 2}, {0: 0.4, 1: 0.8, 2: 0.8, 11: 0.8}),
        # 10 steps down from 0.8 to 0.2
        (
            {"schedule": "linear", "warmup_steps": 2, "final_lr_share": 0.25},
            {0: 0.4, 1: 0.8, 2: 0.8, 3: 0.74, 7: 0.5, 11: 0.26, 12: 0.2, 99: 0.2},
        ),
        # up in 2, there until step 8, then 4 steps down to 0
        (
            {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4, "final_lr_share": 0.0},
            {0: 0.4, 1: 0.8, 7: 0.8, 8: 0.8, 9: 0.6, 10: 0.4, 11: 0.2, 12: 0.0, 99: 0.0},
        ),
    ],
)
def test_learning_rates_by_hand(fields, expected):
    rates = {step: lr_at(phase(**fields), step) for step in expected}
    assert rates == {
        step: pytest.approx(rate, rel=1e-12, abs=1e-15) for step, rate in expected.items()
    }


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"schedule": "poly"}, "schedule"),
        ({"schedule": "linear"}, "final_lr_share"),  # would be constant
        ({"schedule": "constant", "final_lr_share": 0.1}, "final_lr_share"),
        ({"schedule": "wsd", "final_lr_share": 0.1}, "decay_steps"),
        (
            {"schedule": "wsd", "final_lr_share": 0.1, "warmup_steps": 9, "decay_steps": 4},
            "decay_steps",
        ),
        ({"decay_steps": 4}, "decay_steps"),
    ],
)
def test_a_curve_that_cannot_be_right_is_refused(fields, field):
    with pytest.raises(ValueError, match=rf"phases\[p\].{field} is"):
        phase(**fields)


def test_matrices_decay_and_vectors_do_not():
    assert decays("model.embed_tokens.weight", torch.empty(2, 2))
    assert decays("mlp.experts.gate_up_proj", torch.empty(2, 2, 2))
    assert not decays("model.norm.weight", torch.empty(2))
    assert not decays("gate.bias", torch.empty(2))


def test_adamw_by_its_formula():
    """Two steps on one number in each of two groups; the second says that it does not decay."""
    config = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    decayed, plain = (nn.Parameter(torch.tensor([2.0], dtype=torch.float64)) for _ in range(2))
    optimizer = build_adamw(
        [{"params": [decayed]}, {"params": [plain], "weight_decay": 0.0}], config
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    expected = {0.5: 2.0, 0.0: 2.0}
    m = v = 0.0
    for step, gradient in enumerate([3.0, -0.1], start=1):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        decayed.grad = torch.tensor([gradient], dtype=torch.float64)
        plain.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        direction = (m / (1 - 0.8**step)) / (math.sqrt(v / (1 - 0.9**step)) + 1e-3)
        expected = {decay: w - 0.1 * decay * w - 0.1 * direction for decay, w in expected.items()}
    assert [decayed.item(), plain.item()] == pytest.approx(list(expected.values()), rel=1e-12)


def test_an_elements_result_does_not_depend_on_its_place():
    """Bit by bit the same in one long vector as in pieces of it: shards may lie anywhere."""
    generator = torch.Generator().manual_seed(3)
    weights, *gradients = torch.randn(4, 1003, generator=generator)

    def updated(pieces: list[torch.Tensor], cuts: list[int]) -> torch.Tensor:
        parameters = [nn.Parameter(piece.clone()) for piece in pieces]
        optimizer = build_adamw([{"params": parameters}], OptimConfig())
        optimizer.param_groups[0]["lr"] = 1e-2
        for gradient in gradients:
            for parameter, piece in zip(parameters, gradient.split(cuts), strict=True):
                parameter.grad = piece.clone()
            optimizer.step()
        return torch.cat([parameter.detach() for parameter in parameters])

    cuts = [1, 7, 500, 495]
    assert torch.equal(updated([weights], [1003]), updated(list(weights.split(cuts)), cuts))
