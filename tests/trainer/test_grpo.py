import math
from dataclasses import replace

import pytest
import torch
from gossamer.comm.rollout import Sample
from gossamer.trainer.losses import learned_logprobs
from gossamer.trainer.rl.config import RLConfig
from gossamer.trainer.rl.grpo import PolicyBatch, group_advantages, pack_samples, policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = RLConfig(clip_low=0.2, clip_high=0.3)


def rows(seq_len):
    return RLConfig(seq_len=seq_len, max_new_tokens=1)


def _sample(name, token_ids, logprobs):
    return Sample(request_id=name, token_ids=token_ids, logprobs=logprobs, spans=(), finished=True)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    centred = group_advantages(rewards, normalise_by_std=False)
    assert centred.tolist() == [[0.5, -0.5, -0.5, 0.5], [0] * 4, [-0.25, -0.25, -0.25, 0.75]]
    scaled = group_advantages(rewards, normalise_by_std=True, eps=0.0)
    assert scaled[0].tolist() == [1, -1, -1, 1]
    assert scaled[2, 3].item() == pytest.approx(0.75 / math.sqrt(3 / 16))
    assert group_advantages(rewards, normalise_by_std=True)[1].tolist() == [0] * 4


def test_pack_by_hand():
    samples = [_sample("a", (7, 8, 2), (-0.1, -0.2, -0.3)), _sample("b", (9,), (-0.5,))]
    batch = pack_samples(samples, [[1, 5], [1, 6, 4]], [1.0, -2.0], rows(6), 0, rows_multiple=4)
    assert batch.token_ids_BS.tolist() == [[1, 5, 7, 8, 2, 0], [1, 6, 4, 9, 0, 0], [0] * 6, [0] * 6]
    assert batch.position_ids_BS[:2].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 0, 0]]
    assert batch.weights_BS[:2].tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert batch.advantages_BS[:2].tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, -2, 0, 0, 0]]
    behaviour = torch.tensor([[0, -0.1, -0.2, -0.3, 0, 0], [0, 0, -0.5, 0, 0, 0]])
    assert torch.equal(batch.behaviour_logprobs_BS[:2], behaviour)
    assert all(not tensor[2:].any() for tensor in batch.to_tensors())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=15))
def test_pack_keeps_every_completion_token(lengths):
    samples = [
        _sample(str(i), (i + 3,) * c, tuple(-(i + k / 10) for k in range(c)))
        for i, (_, c) in enumerate(lengths)
    ]
    prompts = [[1] * p for p, _ in lengths]
    advantages = [float(i) for i in range(len(lengths))]
    batch = pack_samples(samples, prompts, advantages, rows(12), 0)
    learned = batch.weights_BS == 1
    targets = batch.token_ids_BS.roll(-1, 1)[learned]
    found = zip(
        targets.tolist(),
        batch.advantages_BS[learned].tolist(),
        batch.behaviour_logprobs_BS[learned].double().tolist(),
        strict=True,
    )
    expected = [
        (token, advantage, float(torch.tensor(logprob)))
        for sample, advantage in zip(samples, advantages, strict=True)
        for token, logprob in zip(sample.token_ids, sample.logprobs, strict=True)
    ]
    assert sorted(found) == sorted(expected)


def test_too_long_sample_is_refused():
    sample = _sample("a", (1, 2, 3), (0.0,) * 3)
    with pytest.raises(ValueError, match="seq_len 4"):
        pack_samples([sample], [[1, 1]], [0.0], rows(4), 0)


def test_split_and_broadcast_keep_the_type():
    batch = pack_samples([_sample("a", (7,), (-1.0,))], [[1]], [3.0], rows(3), 0)
    last = PolicyBatch.from_tensors(batch.to_tensors()).split(1, 2)
    assert isinstance(last, PolicyBatch)
    assert last.advantages_BS.tolist() == [[0, 0, 0]]


def _one_token(probability, behaviour, advantage):
    """A batch of one learned token, and logits that give it `probability`."""
    batch = pack_samples(
        [_sample("a", (1,), (math.log(behaviour),))], [[2]], [advantage], rows(2), 0
    )
    logits = torch.zeros(1, 2, 3, dtype=torch.float64)
    logits[0, 0, 1] = math.log(2 * probability / (1 - probability))
    return logits.requires_grad_(), batch


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "is_clipped"),
    [
        (1.0, 2.0, 2.0, False),
        (1.2, 2.0, 2.4, False),
        (1.5, 2.0, 1.3 * 2.0, True),
        (0.5, 2.0, 1.0, False),
        (0.5, -2.0, 0.8 * -2.0, True),
        (1.5, -2.0, -3.0, False),
        (0.9, -2.0, -1.8, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, surrogate, is_clipped):
    logits, batch = _one_token(0.4 * ratio, 0.4, advantage)
    loss = policy_loss(logits, batch, CONFIG)
    assert loss.loss_sum.item() == pytest.approx(-surrogate, rel=1e-6)
    assert loss.ratio_sum.item() == pytest.approx(ratio, rel=1e-6)
    assert loss.clipped_sum.item() == int(is_clipped)
    (gradient,) = torch.autograd.grad(loss.loss_sum, logits)
    # d(-r A)/d logit of the token = -r A (1 - p), and none once clipped
    expected = 0.0 if is_clipped else -ratio * advantage * (1 - 0.4 * ratio)
    assert gradient[0, 0, 1].item() == pytest.approx(expected, rel=1e-6)
    assert not gradient[0, 1].any()


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.5, 1.5), (2.4, 2.0)])
def test_truncated_importance_weight_by_hand(ratio, weight):
    logits, batch = _one_token(0.4 * ratio, 0.4, 3.0)
    loss = policy_loss(logits, batch, replace(CONFIG, importance_cap=2.0))
    (gradient,) = torch.autograd.grad(loss.loss_sum, logits)
    assert loss.loss_sum.item() == pytest.approx(-weight * 3.0 * math.log(0.4 * ratio), rel=1e-6)
    assert gradient[0, 0, 1].item() == pytest.approx(-weight * 3.0 * (1 - 0.4 * ratio), rel=1e-6)
    assert loss.clipped_sum.item() == int(weight != ratio)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_on_policy_gradient_is_reinforce(temperature):
    torch.manual_seed(0)
    logits = torch.randn(1, 12, 6, dtype=torch.float64, requires_grad=True)
    config = replace(CONFIG, temperature=temperature)
    samples = [_sample("a", (3, 4, 2), (0.0,) * 3), _sample("b", (5, 2), (0.0,) * 2)]
    batch = pack_samples(samples, [[1, 3], [1, 4]], [1.5, -0.5], rows(12), 0)
    logprobs = learned_logprobs(logits, batch, temperature)
    behaviour = batch.behaviour_logprobs_BS.double()
    behaviour[batch.weights_BS == 1] = logprobs.detach()
    batch = replace(batch, behaviour_logprobs_BS=behaviour)
    loss = policy_loss(logits, batch, config)
    plain = -(torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5]) * logprobs).sum()
    assert loss.ratio_sum.item() == pytest.approx(5.0)
    for found, expected in zip(
        torch.autograd.grad(loss.loss_sum, logits, retain_graph=True),
        torch.autograd.grad(plain, logits),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_absurd_ratio_stays_finite():
    logits, batch = _one_token(0.99, 1e-300, -1.0)
    logits = logits.detach().float().requires_grad_()
    loss = policy_loss(logits, batch, CONFIG)
    (gradient,) = torch.autograd.grad(loss.loss_sum, logits)
    assert torch.isfinite(loss.loss_sum) and torch.isfinite(gradient).all()


def test_batch_without_samples_gives_zero():
    logits = torch.randn(2, 4, 3, requires_grad=True)
    batch = pack_samples([_sample("a", (1,), (-1.0,))], [[2]], [1.0], rows(4), 0, rows_multiple=3)
    loss = policy_loss(logits, batch.split(1, 2), CONFIG)
    (gradient,) = torch.autograd.grad(loss.loss_sum, logits)
    assert loss.loss_sum.item() == loss.ratio_sum.item() == 0.0
    assert not gradient.any()
