"""comm/engines/hf.py follows a log of every model family: names, routing biases, one delta."""

import pytest
import torch
from gossamer.comm.engines.hf import HFEngine, live_tensors
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import read_state
from gossamer.comm.rollout import Request
from safetensors.torch import load_file
from tiny_families import FAMILIES, hf_fields, save, transformers_model

torch.set_num_threads(1)
PROMPT = (5, 17, 40, 3, 61)


def greedy(model):
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    return tuple(out[0, len(PROMPT) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_follows_a_log_of_the_family(family, tmp_path):
    model = transformers_model(family, torch.bfloat16)
    save(model, tmp_path / "hf")
    checkpoint = load_file(tmp_path / "hf" / "model.safetensors")
    log = WeightLog.open(tmp_path / "log", run_id="test", create=True)
    publisher = Publisher(log)
    engine = HFEngine(hf_fields(family), log, pad_id=0, eos_id=2)
    request = Request(
        request_id="0", prompt_ids=PROMPT, max_new_tokens=8, temperature=0.0, key=(0,)
    )
    for step in range(2):
        weights = live_tensors(model)
        assert weights.keys() == checkpoint.keys()
        if step == 0:
            assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in weights.items())
        version = publisher.publish(weights, step=step).version
        engine.stage(version)
        engine.commit()
        state = read_state(log)
        assert state.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
        assert engine.audit() == log.manifest(version).state_hash
        (sample,) = engine.generate([request])
        assert sample.token_ids == greedy(model)
        for tensor in weights.values():  # routing biases too
            tensor[torch.rand(tensor.shape) < 0.05] *= -1.5


def test_routing_biases_travel_in_float32(tmp_path):
    model = transformers_model("deepseek_v3", torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = live_tensors(model)[name]
    bias += 1e-4  # bfloat16 would lose this
    log = WeightLog.open(tmp_path, run_id="test", create=True)
    Publisher(log).publish(live_tensors(model), step=0)
    engine = HFEngine(hf_fields("deepseek_v3"), log, pad_id=0, eos_id=2)
    engine.stage(0)
    engine.commit()
    assert engine.audit() == log.manifest(0).state_hash
    assert torch.equal(read_state(log)[name], bias) and bias.dtype == torch.float32
