import math

import pytest
import torch
from gossamer.trainer.batch import Document, pack
from gossamer.trainer.losses import learned_logprobs, next_token_loss_sum, token_logprobs

DOCUMENTS = [Document(token_ids=[1, 2, 0]), Document(token_ids=[3, 1, 2], learn_from=2)]
BATCH = pack(DOCUMENTS, [[0], [1], []], seq_len=4)[0]


def _logits(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(3, 4, 5, dtype=torch.float64).to(dtype).requires_grad_()


def _plain(logits_BSV):
    """-log softmax of each learned token, written out."""
    total = 0.0
    for b, s, target in ((0, 0, 2), (0, 1, 0), (1, 1, 2)):
        row = logits_BSV[b, s].tolist()
        total += math.log(sum(math.exp(x) for x in row)) - row[target]
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_loss_is_the_plain_sum(dtype):
    logits = _logits(dtype)
    loss = next_token_loss_sum(logits, BATCH)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert loss.item() == pytest.approx(_plain(logits), rel=tolerance)


def test_uniform_logits_by_hand():
    assert next_token_loss_sum(torch.zeros(3, 4, 5), BATCH).item() == pytest.approx(3 * math.log(5))


def test_sum_adds_up_over_any_split():
    logits = _logits(torch.float64)
    whole = next_token_loss_sum(logits, BATCH)
    (gradient,) = torch.autograd.grad(whole, logits)
    logits_padded = torch.cat([logits, logits[:1]])
    for parts in (1, 2, 3, 4):
        rows = -(-3 // parts)
        pieces = [
            next_token_loss_sum(logits_padded[i * rows : (i + 1) * rows], BATCH.split(i, parts))
            for i in range(parts)
            if i * rows < 3
        ]
        torch.testing.assert_close(sum(pieces), whole, rtol=1e-14, atol=0)
        (split_gradient,) = torch.autograd.grad(sum(pieces), logits)
        torch.testing.assert_close(split_gradient, gradient, rtol=1e-13, atol=1e-15)


def test_rows_without_weight_give_zero_with_a_gradient():
    logits = _logits()
    loss = next_token_loss_sum(logits[2:], BATCH.split(2, 3))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0
    assert not gradient.any()


def test_gradient_stays_within_documents():
    logits = _logits()
    (gradient,) = torch.autograd.grad(next_token_loss_sum(logits, BATCH), logits)
    touched = gradient.abs().sum(-1) > 0
    assert torch.equal(touched, BATCH.weights_BS > 0)


def test_token_logprobs_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    logprobs = token_logprobs(logits, torch.tensor([1, 0]), temperature=1.0)
    assert logprobs.exp().tolist() == pytest.approx([0.75, 0.25])
    sharper = token_logprobs(logits, torch.tensor([1, 0]), temperature=0.5)
    assert sharper.exp().tolist() == pytest.approx([0.9, 0.1])


def test_learned_logprobs_are_the_loss():
    logits = _logits(torch.float64)
    logprobs = learned_logprobs(logits, BATCH, temperature=1.0)
    assert logprobs.shape == (3,)
    assert -logprobs.sum().item() == pytest.approx(_plain(logits), rel=1e-12)
