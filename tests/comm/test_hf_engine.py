"""comm/engines/hf.py: what the contract cannot see, against transformers and plain statistics."""

import threading
import time

import numpy as np
import pytest
import torch
from gossamer.comm.config import LogConfig
from gossamer.comm.engines.hf import (
    HFEngine,
    live_tensors,
    sample_tokens,
    uniforms,
    version_spans,
)
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher, Rows
from gossamer.comm.rollout import Request, VersionSpan
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
PAD, EOS = 0, 1


def reference_model():
    torch.manual_seed(3)
    config = AutoConfig.for_model(**MODEL)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


class Trainer:
    """A reference model whose weights are published as they stand."""

    def __init__(self, path):
        self.model = reference_model()
        self.state = live_tensors(self.model)
        self.log = WeightLog.open(path, run_id="test", create=True)
        epoch = self.log.claim_epoch()
        self.publisher = Publisher(
            self.log, part=0, num_parts=1, writer_epoch=epoch, config=LogConfig()
        )

    def publish(self, step=0):
        rows = [
            Rows(name=name, shape=tuple(t.shape), row_start=0, values=t)
            for name, t in sorted(self.state.items())
        ]
        return self.publisher.publish(rows, step=step).version

    def change(self):
        for tensor in self.state.values():
            tensor[torch.rand(tensor.shape) < 0.02] *= -1.5


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path / "log")


@pytest.fixture
def engine(trainer):
    engine = HFEngine(MODEL, trainer.log, pad_id=PAD, eos_id=EOS)
    engine.stage(trainer.publish())
    engine.commit()
    return engine


def requests_for(prompts, max_new_tokens=8, temperature=0.0):
    return [
        Request(
            request_id=str(i),
            prompt_ids=tuple(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            key=(0, i),
        )
        for i, prompt in enumerate(prompts)
    ]


PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 9, 14, 3)] + [[40, 41, 2]]


def test_greedy_equals_transformers_generate(engine, trainer):
    samples = engine.generate(requests_for(PROMPTS))
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        out = trainer.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        assert sample.token_ids == tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_equal_teacher_forcing(engine, trainer, temperature):
    for prompt, sample in zip(
        PROMPTS, engine.generate(requests_for(PROMPTS, temperature=temperature)), strict=True
    ):
        ids = torch.tensor([prompt + list(sample.token_ids)])
        with torch.no_grad():
            logits = trainer.model(ids).logits[0, len(prompt) - 1 : -1].double()
        expected = (logits / (temperature or 1.0)).log_softmax(-1)
        expected = expected.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(sample.logprobs, dtype=torch.float64), expected, atol=0.06, rtol=0
        )


def test_a_sample_stops_at_eos_and_the_rest_goes_on(engine, trainer):
    greedy = engine.generate(requests_for(PROMPTS))
    third = greedy[1].token_ids[2]
    stopping = HFEngine(MODEL, trainer.log, pad_id=PAD, eos_id=third)
    stopping.stage(trainer.log.head())
    stopping.commit()
    for sample, whole in zip(stopping.generate(requests_for(PROMPTS)), greedy, strict=True):
        tokens = whole.token_ids
        stop = tokens.index(third) + 1 if third in tokens else len(tokens)
        assert sample.token_ids == tokens[:stop] and sample.finished == (third in tokens)


TIED = {**MODEL, "model_type": "qwen3", "tie_word_embeddings": True}
WITH_BUFFER = {
    **MODEL,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.mark.parametrize("config", [MODEL, TIED, WITH_BUFFER], ids=lambda c: c["model_type"])
def test_live_tensors_are_what_save_pretrained_writes(tmp_path, config):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    live = live_tensors(model)
    assert live.keys() == saved.keys()
    assert {t.dtype for t in live.values()} == {torch.bfloat16}
    assert len({t.data_ptr() for t in live.values()}) == len(live)
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert {t.untyped_storage().data_ptr() for t in live.values()} == storages


def test_commit_lands_between_two_decode_steps(engine, trainer):
    requests = requests_for(PROMPTS, max_new_tokens=6)
    before = engine.generate(requests)
    trainer.change()
    old, new = engine.version, trainer.publish()
    engine.stage(new)
    committer = threading.Thread(target=engine.commit)
    steps = []

    def commit_in_step_3(*_):
        steps.append(engine.version)
        if len(steps) == 3:
            committer.start()
            deadline = time.monotonic() + 10
            while not engine._gate.locked() and time.monotonic() < deadline:
                time.sleep(0.001)
            assert engine.version == old  # the committer waits for the running step

    hook = engine._model.register_forward_hook(commit_in_step_3)
    during = engine.generate(requests)
    hook.remove()
    committer.join()
    assert steps == [old] * 3 + [new] * 3
    for sample, unmixed in zip(during, before, strict=True):
        assert sample.token_ids[:3] == unmixed.token_ids[:3]
        assert sample.spans == (
            VersionSpan(start=0, stop=3, version=old),
            VersionSpan(start=3, stop=6, version=new),
        )
    assert engine.audit() == trainer.log.manifest(new).state_hash
    fresh = HFEngine(MODEL, trainer.log, pad_id=PAD, eos_id=EOS)
    for version in (old, new):
        fresh.stage(version)
        fresh.commit()
    assert fresh.version == new and fresh.generate(requests) == engine.generate(requests)


def test_engine_follows_several_deltas_exactly(engine, trainer):
    for step in range(1, 5):
        trainer.change()
        engine.stage(trainer.publish(step))
        committed = engine.commit()
        assert committed.version == trainer.log.head() and committed.num_changed > 0
        live = live_tensors(engine._model)
        for name, tensor in trainer.state.items():
            assert torch.equal(live[name].view(torch.int16), tensor.view(torch.int16)), name
        assert engine.audit() == trainer.log.manifest(engine.version).state_hash


def test_inverse_cdf_draws_the_softmax():
    logits = torch.tensor([2.0, -1.0, 0.5, -float("inf"), 1.0, 0.0])
    n, temperature = 20_000, 0.8
    uniform = torch.from_numpy(np.random.default_rng(0).random(n))
    tokens, logprobs = sample_tokens(
        logits.expand(n, -1), torch.full((n,), temperature, dtype=torch.float64), uniform
    )
    probs = (logits.double() / temperature).softmax(0)
    counts = torch.bincount(tokens, minlength=6)
    assert counts[3] == 0
    keep = probs > 0
    chi2 = ((counts - n * probs)[keep] ** 2 / (n * probs)[keep]).sum()
    assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001
    torch.testing.assert_close(logprobs, probs.log()[tokens])


def test_draws_at_the_ends_of_the_interval_stay_in_the_support():
    logits = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]]).expand(2, -1)
    uniform = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens, _ = sample_tokens(logits, torch.ones(2, dtype=torch.float64), uniform)
    assert tokens.tolist() == [1, 2]


def test_logits_that_are_not_finite_are_refused():
    logits = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_tokens(logits, torch.ones(1), torch.zeros(1, dtype=torch.float64))


def test_uniforms_depend_on_the_key_alone():
    def draws(*keys, n=4):
        return uniforms(
            [
                Request(request_id="r", prompt_ids=(2,), max_new_tokens=n, temperature=1.0, key=key)
                for key in keys
            ]
        )

    both = draws((1, 2), (1, 2, 0))
    assert torch.equal(both[:1], draws((1, 2))) and not torch.equal(both[0], both[1])
    assert torch.equal(draws((1, 2), n=9)[:, :4], draws((1, 2)))
    assert ((both >= 0) & (both < 1)).all()


def test_version_spans():
    assert version_spans([4, 4, 5]) == (
        VersionSpan(start=0, stop=2, version=4),
        VersionSpan(start=2, stop=3, version=5),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", ()),
        ("prompt_ids", (3, 128)),
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
    ],
)
def test_a_request_that_cannot_run_is_refused(engine, field, value):
    fields = {"prompt_ids": (3,), "max_new_tokens": 2, "temperature": 1.0} | {field: value}
    with pytest.raises(ValueError, match=f"request bad: .*{field}"):
        engine.generate([Request(request_id="bad", key=(0,), **fields)])


def test_a_config_without_model_type_is_refused(trainer):
    with pytest.raises(ValueError, match="model_type"):
        HFEngine({"hidden_size": 64}, trainer.log, pad_id=PAD, eos_id=EOS)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_it_holds_what_the_config_says_that_the_log_holds(dtype, tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    model = reference_model().to(getattr(torch, dtype))
    publisher = Publisher(log, config=LogConfig(publish_dtype=dtype))
    state = live_tensors(model)
    rows = [Rows(name, tuple(each.shape), 0, each) for name, each in state.items()]
    publisher.publish(rows, step=0)
    engine = HFEngine({**MODEL, "dtype": dtype}, log, pad_id=PAD, eos_id=EOS)
    engine.stage(0)
    engine.commit()
    assert engine.audit() == log.manifest(0).state_hash
