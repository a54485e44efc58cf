"""Every policy loss beside a slow one of plain Python floats, gradients in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from gossamer.comm.rollout import Sample, VersionSpan
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.rl.config import RLConfig
from gossamer.trainer.rl.grpo import group_advantages, loss_divisor, pack_samples, policy_loss
from hypothesis import given, settings
from hypothesis import strategies as st

VERSION, VOCABULARY = 7, 5
CONFIG = RLConfig(seq_len=16, max_new_tokens=6, clip_low=0.2, clip_high=0.3)
SURROGATES = {
    "clipped": {},
    "truncated": {"importance_cap": 1.5},
    "decoupled": {"decoupled": True},
    "decoupled, capped": {"decoupled": True, "importance_cap": 1.2},
}


def slow_token_loss(logprob, behaviour, reference, staleness, advantage, config):
    """(loss, its derivative by logprob, whether a bound held) of one token."""
    ratio, cap = math.exp(logprob - behaviour), config.importance_cap
    weight, is_bound, derivative = 1.0, False, 0.0
    if cap is not None and not config.decoupled:
        weight = min(ratio, cap)
        loss, derivative = -weight * advantage * logprob, -weight * advantage
        is_bound = ratio > cap
    else:
        if config.decoupled:
            way = max(0, staleness - 1) / max(1, staleness)
            proximal = behaviour + way * (logprob - behaviour)
            weight = math.exp(proximal - behaviour)
            ratio = math.exp(logprob - proximal)
            if cap is not None and weight > cap:
                weight, is_bound = cap, True
        low, high = 1 - config.clip_low, 1 + config.clip_high
        plain, bounded = ratio * advantage, min(max(ratio, low), high) * advantage
        if bounded < plain:
            loss, is_bound = -weight * bounded, True
        else:
            loss, derivative = -weight * plain, -weight * plain
    if config.kl_coef:
        difference = reference - logprob
        loss += config.kl_coef * (math.exp(difference) - difference - 1)
        derivative += config.kl_coef * (1 - math.exp(difference))
    return loss, derivative, is_bound


def slow_loss(groups, logprobs, config):
    """Loss and derivative of each token; groups of (sample, reference log-probs, advantage)."""
    every = []
    for (sample, reference, advantage), own in zip(groups, logprobs, strict=True):
        ages = [VERSION - s.version for s in sample.spans for _ in range(s.start, s.stop)]
        tokens = [
            slow_token_loss(logprob, behaviour, told, age, advantage, config)
            for logprob, behaviour, told, age in zip(
                own, sample.logprobs, reference, ages, strict=True
            )
        ]
        scale = {
            "tokens": 1 / sum(len(each.token_ids) for each, _, _ in groups),
            "samples": 1 / len(tokens) / len(groups),
            "fixed": 1 / config.max_new_tokens / len(groups),
        }[config.loss_mean]
        every += [(loss * scale, slope * scale, bound) for loss, slope, bound in tokens]
    return every


@st.composite
def sampled(draw):
    """Samples of up to three versions, told in 1/64 so that float32 holds them."""
    number = st.integers(-150, -5).map(lambda n: n / 64)
    groups = []
    for name in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, CONFIG.max_new_tokens))
        ids = tuple(draw(st.lists(st.integers(0, 4), min_size=length, max_size=length)))
        logprobs, reference = (
            tuple(draw(st.lists(number, min_size=length, max_size=length))) for _ in range(2)
        )
        cuts = sorted(draw(st.lists(st.integers(0, length), max_size=2)))
        edges = [0, *cuts, length]
        spans = tuple(
            VersionSpan(start=start, stop=stop, version=VERSION - 3 + i)
            for i, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))
            if start < stop
        )
        sample = Sample(
            request_id=str(name), token_ids=ids, logprobs=logprobs, spans=spans, finished=True
        )
        groups.append((sample, reference, draw(st.integers(-128, 128)) / 64))
    return groups, draw(st.integers(0, 1000))


@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize("loss_mean", ["tokens", "samples", "fixed"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@given(
    sampled=sampled(), kl_coef=st.sampled_from([0.0, 0.1]), temperature=st.sampled_from([1, 0.7])
)
def test_loss_and_gradient_equal_slow_ones(surrogate, loss_mean, sampled, kl_coef, temperature):
    groups, seed = sampled
    config = replace(
        CONFIG,
        loss_mean=loss_mean,
        kl_coef=kl_coef,
        temperature=temperature,
        **SURROGATES[surrogate],
    )
    samples, advantages = [g[0] for g in groups], [g[2] for g in groups]
    prompts = [[1] * (1 + i % 3) for i in range(len(groups))]
    batch = pack_samples(samples, prompts, advantages, config, VERSION, rows_multiple=2)
    learned = batch.weights_BS != 0
    told = torch.zeros_like(batch.reference_logprobs_BS)
    # rows are filled in order, so learned tokens come in the order of the samples they are of
    places = {sample.request_id: place for place, sample in enumerate(order_of(batch, samples))}
    groups = sorted(groups, key=lambda group: places[group[0].request_id])
    told[learned] = torch.tensor([r for group in groups for r in group[1]])
    batch = replace(batch, reference_logprobs_BS=told)

    generator = torch.Generator().manual_seed(seed)
    shape = (*batch.token_ids_BS.shape, VOCABULARY)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    loss = policy_loss(logits, batch, config)
    value = loss.loss_sum / loss_divisor(batch, config)
    (gradient,) = torch.autograd.grad(value, logits)

    logprob_TV = (logits.detach()[learned] / temperature).log_softmax(-1)
    targets = [token for group in groups for token in group[0].token_ids]
    flat = [logprob_TV[t, token].item() for t, token in enumerate(targets)]
    lengths = [len(group[0].token_ids) for group in groups]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    own = [flat[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    expected = slow_loss(groups, own, config)
    assert value.item() == pytest.approx(sum(e[0] for e in expected), rel=1e-6, abs=1e-7)
    assert loss.clipped_sum.item() == sum(e[2] for e in expected)
    slope = torch.zeros_like(logits)
    hot = torch.nn.functional.one_hot(torch.tensor(targets), VOCABULARY) - logprob_TV.exp()
    slopes = torch.tensor([e[1] for e in expected], dtype=torch.float64)
    slope[learned] = slopes[:, None] * hot / temperature
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-7)


def order_of(batch: TokenBatch, samples: list[Sample]) -> list[Sample]:
    """The samples in the order in which first fit laid them into rows, worked out by hand."""
    rows: list[list[int]] = []
    for index, sample in enumerate(samples):
        size = 1 + index % 3 + len(sample.token_ids)
        for row in rows:
            used = sum(1 + i % 3 + len(samples[i].token_ids) for i in row)
            if used + size <= CONFIG.seq_len:
                row.append(index)
                break
        else:
            rows.append([index])
    assert len(rows) <= len(batch.token_ids_BS)
    return [samples[index] for row in rows for index in row]


def test_means_by_hand():
    def sample(name, num):
        logprobs = (0.0,) * num
        return Sample(
            request_id=name, token_ids=(2,) * num, logprobs=logprobs, spans=(), finished=True
        )

    samples = [sample("long", 4), sample("short", 1)]
    weights = {"tokens": 1 / 5, "samples": 1 / 2, "fixed": 1 / 12}
    for loss_mean, share in weights.items():
        config = replace(CONFIG, loss_mean=loss_mean)
        batch = pack_samples(samples, [[1], [1]], [1.0, 1.0], config, 0)
        divided = batch.weights_BS / loss_divisor(batch, config)
        long = share / 4 if loss_mean == "samples" else share
        expected = [*[long] * 4, 0, share, *[0] * 10]
        assert divided[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    found = group_advantages(rewards, normalise_by_std=False, leave_one_out=True)
    expected = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2, -2 / 3, -2 / 3, -2 / 3]]
    assert found.flatten().tolist() == pytest.approx(sum(expected, []))


@pytest.mark.parametrize(
    ("staleness", "ratio", "advantage", "value", "slope"),
    [
        # up to one version old: the behaviour policy is the anchor, as in plain PPO
        (0, 1.2, 2.0, -2.4, -2.4),
        (1, 1.6, 2.0, -2.6, 0.0),
        # two versions: the anchor is half way, sqrt(1.44) of the ratio on either side of it
        (2, 1.44, 2.0, -1.2 * 1.2 * 2, -1.2 * 1.2 * 2),
        # sqrt(1.96) = 1.4 is clipped to 1.3, times proximal over behaviour
        (2, 1.96, 2.0, -1.4 * 1.3 * 2, 0.0),
        # the same under a cap of 1.25 on that weight
        (3, 1.728, -1.0, 1.25 * 1.2, 1.25 * 1.2),
    ],
)
def test_decoupled_by_hand(staleness, ratio, advantage, value, slope):
    config = replace(CONFIG, decoupled=True, importance_cap=1.25 if staleness == 3 else None)
    spans = (VersionSpan(start=0, stop=1, version=VERSION - staleness),)
    sample = Sample(
        request_id="a", token_ids=(1,), logprobs=(math.log(0.25),), spans=spans, finished=True
    )
    batch = pack_samples([sample], [[2]], [advantage], config, VERSION)
    probability = 0.25 * ratio
    logits = torch.zeros(1, 16, 3, dtype=torch.float64)
    logits[0, 0, 1] = math.log(2 * probability / (1 - probability))
    logits.requires_grad_()
    loss = policy_loss(logits, batch, config)
    (gradient,) = torch.autograd.grad(loss.loss_sum, logits)
    assert loss.loss_sum.item() == pytest.approx(value, rel=1e-6)
    assert gradient[0, 0, 1].item() == pytest.approx(slope * (1 - probability), rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(sampled=sampled())
def test_decoupled_is_plain_ppo_to_the_bit_up_to_one_version(sampled):
    groups, seed = sampled
    spans = (VersionSpan(start=0, stop=CONFIG.max_new_tokens, version=VERSION - seed % 2),)
    samples = [replace(group[0], spans=spans) for group in groups]
    advantages = [group[2] for group in groups]
    batch = pack_samples(samples, [[1]] * len(groups), advantages, CONFIG, VERSION)
    logits = torch.randn((*batch.token_ids_BS.shape, VOCABULARY), requires_grad=True)
    found = []
    for config in (CONFIG, replace(CONFIG, decoupled=True, importance_cap=1.0)):
        loss = policy_loss(logits, batch, config).loss_sum
        found.append((loss, *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(plain, decoupled) for plain, decoupled in zip(*found, strict=True))


def test_kl_by_hand():
    config = replace(CONFIG, kl_coef=0.5)
    sample = Sample(
        request_id="a", token_ids=(1,), logprobs=(math.log(0.5),), spans=(), finished=True
    )
    batch = pack_samples([sample], [[2]], [0.0], config, 0)
    told = torch.zeros_like(batch.reference_logprobs_BS)
    told[0, 0] = math.log(0.25)
    logits = torch.zeros(1, 16, 3, dtype=torch.float64)
    logits[0, 0, 1] = math.log(2.0)
    logits.requires_grad_()
    loss = policy_loss(logits, replace(batch, reference_logprobs_BS=told), config)
    (gradient,) = torch.autograd.grad(loss.loss_sum, logits)
    kl = 0.5 + math.log(2) - 1  # reference over policy is 1/2
    assert loss.kl_sum.item() == pytest.approx(kl, rel=1e-6)
    assert loss.loss_sum.item() == pytest.approx(0.5 * kl, rel=1e-6)
    assert gradient[0, 0, 1].item() == pytest.approx(0.5 * (1 - 0.5) * 0.5, rel=1e-6)

    # far beyond what exp() is trusted with it still pulls towards the reference, ever as hard
    pulls = []
    for logit in (-19.0, -21.0, -60.0):
        with torch.no_grad():
            logits[0, 0, 1] = logit
        told[0, 0] = 0.0
        loss = policy_loss(logits, replace(batch, reference_logprobs_BS=told), config)
        (gradient,) = torch.autograd.grad(loss.loss_sum, logits)
        pulls.append(gradient[0, 0, 1].item())
        difference = -(logits.detach()[0, 0].log_softmax(0)[1].item())
        beyond = max(0.0, difference - 20)
        kl = math.exp(min(difference, 20)) * (1 + beyond) - difference - 1
        assert loss.kl_sum.item() == pytest.approx(kl, rel=1e-6)
        assert pulls[-1] == pytest.approx(0.5 * (1 - math.exp(min(difference, 20))), rel=1e-6)
    assert pulls[0] > pulls[1] == pytest.approx(pulls[2])
