"""What every registered RolloutEngine must do, checked through the protocol alone."""

import importlib
import threading

import pytest
import torch
from gossamer.comm.config import LogConfig
from gossamer.comm.live import ApplyError
from gossamer.comm.log import WeightLog
from gossamer.comm.names import logical_views
from gossamer.comm.publisher import Publisher, Rows
from gossamer.comm.rollout import ROLLOUT_ENGINES, Request
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_here import VLLM, vllm_here  # noqa: F401

torch.set_num_threads(1)

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
EOS = 1
SMALL = {"max_model_len": 128, "kv_cache_memory_bytes": 1 << 24}
# one builder a registered name: what its constructor needs beside the model and the log
BUILDERS = {
    "hf": lambda cls, log: cls(MODEL, log, pad_id=0, eos_id=EOS),
    "vllm": lambda cls, log: cls(MODEL, log, pad_id=0, eos_id=EOS, options=SMALL),
}
NAMES = [pytest.param(name, marks=VLLM) if name == "vllm" else name for name in ROLLOUT_ENGINES]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Three versions: an anchor and two deltas of about 2 % of the elements."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.bfloat16)
    state = logical_views(model.named_parameters())
    log = WeightLog.open(tmp_path_factory.mktemp("log"), run_id="contract", create=True)
    publisher = Publisher(
        log, part=0, num_parts=1, writer_epoch=log.claim_epoch(), config=LogConfig()
    )
    for step in range(3):
        if step:
            for tensor in state.values():
                tensor[torch.rand(tensor.shape) < 0.02] *= -1.5
        rows = [
            Rows(name=name, shape=tuple(t.shape), row_start=0, values=t)
            for name, t in sorted(state.items())
        ]
        publisher.publish(rows, step=step)
    return log


@pytest.fixture(params=NAMES, scope="module")
def build(request, log):
    if request.param == "vllm":
        request.getfixturevalue("vllm_here")
    module, _, name = ROLLOUT_ENGINES[request.param].partition(":")
    cls = getattr(importlib.import_module(module), name)
    return lambda: BUILDERS[request.param](cls, log)


def versions(log):
    head = log.head()
    return [head - 2, head - 1, head]


def follow(engine, version):
    engine.stage(version)
    return engine.commit().version


def unit(step=0, temperature=1.0, max_new_tokens=6):
    """Four prompts of different lengths, three samples each."""
    return [
        Request(
            request_id=f"{prompt}-{sample}",
            prompt_ids=tuple(range(2 + prompt, 6 + 3 * prompt)),
            max_new_tokens=max_new_tokens - prompt,
            temperature=temperature,
            key=(7, step, prompt, sample),
        )
        for prompt in range(4)
        for sample in range(3)
    ]


def test_generate_is_refused_before_the_first_version(build):
    with pytest.raises(RuntimeError, match="no weight version is live"):
        build().generate(unit())


def test_samples_are_whole(build, log):
    engine = build()
    version = follow(engine, versions(log)[0])
    requests = unit()
    samples = engine.generate(requests)
    assert [s.request_id for s in samples] == [r.request_id for r in requests]
    for request, sample in zip(requests, samples, strict=True):
        assert 1 <= len(sample.token_ids) == len(sample.logprobs) <= request.max_new_tokens
        assert all(logprob <= 0 for logprob in sample.logprobs)
        assert EOS not in sample.token_ids[:-1]
        assert sample.finished == (sample.token_ids[-1] == EOS)
        assert sample.finished or len(sample.token_ids) == request.max_new_tokens
        (span,) = sample.spans
        assert (span.start, span.stop, span.version) == (0, len(sample.token_ids), version)
    assert engine.generate([]) == []


def test_samples_are_a_function_of_weights_and_requests(build, log):
    first, *later = versions(log)
    fresh, travelled = build(), build()
    follow(travelled, first)
    travelled.generate(unit(step=5))
    for version in later:
        follow(travelled, version)
    follow(fresh, first)
    for version in later:
        follow(fresh, version)
    assert fresh.generate(unit()) == travelled.generate(unit()) == fresh.generate(unit())
    other = fresh.generate(unit(step=1))
    assert [s.token_ids for s in other] != [s.token_ids for s in fresh.generate(unit())]


def test_a_cut_ends_the_samples_where_they_are(build, log):
    engine = build()
    follow(engine, versions(log)[0])
    requests, steps = unit(max_new_tokens=12), iter(range(100))
    whole = engine.generate(requests)
    cut = engine.generate(requests, lambda: next(steps) == 4)
    assert [s.request_id for s in cut] == [r.request_id for r in requests]
    for sample, all_of_it in zip(cut, whole, strict=True):
        length = len(sample.token_ids)
        assert sample.token_ids == all_of_it.token_ids[:length] and length <= 4
        assert len(sample.logprobs) == length == sum(s.stop - s.start for s in sample.spans)
        assert sample.finished == (length > 0 and sample.token_ids[-1] == EOS)
    assert all(not s.token_ids for s in engine.generate(requests, lambda: True))
    assert engine.generate(requests) == whole


def test_temperature_zero_ignores_the_key(build, log):
    engine = build()
    follow(engine, versions(log)[0])
    tokens = [s.token_ids for s in engine.generate(unit(temperature=0.0))]
    assert tokens == [s.token_ids for s in engine.generate(unit(step=3, temperature=0.0))]
    assert all(len(set(tokens[i : i + 3])) == 1 for i in range(0, len(tokens), 3))


def test_audit_equals_the_manifest_after_each_version(build, log):
    engine = build()
    for version in versions(log):
        assert follow(engine, version) == version
        assert engine.audit() == log.manifest(version).state_hash


def test_staging_changes_nothing_until_commit(build, log):
    engine = build()
    first, second, _ = versions(log)
    follow(engine, first)
    before, samples = engine.audit(), engine.generate(unit())
    engine.stage(second)
    assert engine.audit() == before and engine.generate(unit()) == samples
    engine.commit()
    assert engine.audit() != before and engine.generate(unit()) != samples


def test_a_version_on_another_base_is_refused(build, log):
    engine = build()
    first, _, third = versions(log)
    follow(engine, first)
    before = engine.audit()
    with pytest.raises(ApplyError, match="base|goes on version"):
        engine.stage(third)
    with pytest.raises(RuntimeError, match="stage"):
        engine.commit()
    assert engine.audit() == before


def test_commit_from_another_thread_while_generating(build, log):
    engine = build()
    first, second, third = versions(log)
    follow(engine, first)

    def follow_the_log():
        for version in (second, third):
            follow(engine, version)

    follower = threading.Thread(target=follow_the_log)
    samples = []
    follower.start()
    while follower.is_alive():
        samples += engine.generate(unit(max_new_tokens=40))
    samples += engine.generate(unit())
    for sample in samples:
        assert [s.start for s in sample.spans] == [0, *(s.stop for s in sample.spans[:-1])]
        assert sample.spans[-1].stop == len(sample.token_ids)
        made_by = [s.version for s in sample.spans]
        assert made_by == sorted(set(made_by)) and set(made_by) <= {first, second, third}
    assert samples[-1].spans[0].version == third
    assert engine.audit() == log.manifest(third).state_hash
    engine.close()
