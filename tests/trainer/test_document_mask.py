"""Documents that share a row do not see one another: each learns what it would learn alone."""

import pytest
import torch
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.batch import Document, TokenBatch, first_fit, pack
from gossamer.trainer.config import ModelConfig
from gossamer.trainer.losses import next_token_loss_sum
from gossamer.trainer.model import MoEModel, build_model, hf_config
from tiny_families import FAMILIES, hf_fields

ALONE = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
LENGTHS = (5, 1, 9, 2, 16, 3, 1, 1, 7, 12)


def documents() -> list[Document]:
    """Of a foreign vocabulary, in which token 0 is a token like any other."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in LENGTHS]
    ids[0][0] = ids[2][4] = ids[3][1] = 0
    return [Document(token_ids=tokens, learn_from=len(tokens) // 3) for tokens in ids]


def loss_and_gradients(model: MoEModel, batches: list[TokenBatch]) -> tuple[float, dict]:
    model.module.zero_grad()
    total = 0.0
    for batch in batches:
        model.context.is_real_T = batch.is_real_BS.flatten()
        logits_BSV = model.module(
            input_ids=batch.token_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
        ).logits
        loss = next_token_loss_sum(logits_BSV, batch)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_learns_what_its_documents_learn_alone(family, attention):
    fields = hf_fields(family) | {"vocab_size": 96, "pad_token_id": None}
    config = ModelConfig(hf=fields, attn_implementation=attention)
    model = build_model(config, hf_config(config, {}), ALONE, seed=2)
    model.module.train()
    held = documents()
    rows = first_fit(LENGTHS, 24)
    assert len(rows) < len(held) / 2
    packed, expected = (
        loss_and_gradients(model, [pack(held, rows, 24)[0]]),
        loss_and_gradients(model, [pack([d], [[0]], len(d.token_ids))[0] for d in held]),
    )
    assert packed[0] == pytest.approx(expected[0], rel=1e-6)
    assert packed[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (packed[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_padding_is_told_from_token_0():
    held = [Document(token_ids=ids) for ids in ([0, 0, 5], [7], [0, 3], [0])]
    batch, _ = pack(held, [[0, 1], [2], [3]], 5)
    assert batch.is_real_BS.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0] * 5]
