"""A bit flips in the live weights of a real engine: drained, and another one in its place."""

import time
from pathlib import Path

import pytest
import ray
import torch
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.config import LogConfig
from gossamer.comm.engines.hf import HFEngine
from gossamer.comm.log import WeightLog
from gossamer.comm.names import logical_views
from gossamer.comm.publisher import Publisher, Rows
from gossamer.comm.rollout import Request
from gossamer.launch.config import RecoveryConfig, RolloutConfig
from gossamer.launch.rollout_pool import RolloutPool
from tiny_run import SETTINGS, events
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
FLIPPED, PUBLISHED = "lm_head.weight", "model.embed_tokens.weight"


class FlippingEngine(HFEngine):
    """Before it samples for the first time a bit flips; it samples until that was looked for."""

    def generate(self, requests, is_cut=None):
        marker = Path(self._subscriber._log.url, "flipped")
        if not marker.exists():
            tensor_bits(self._live.tensors[FLIPPED])[7] ^= 1
            marker.touch()
            while self.version < 1:
                time.sleep(0.01)
            time.sleep(1.0)  # its audit is over by then
        return super().generate(requests, is_cut)


def requests() -> list[Request]:
    return [
        Request(request_id=f"r{i}", prompt_ids=(5, 6, 7), max_new_tokens=8, temperature=1.0,
                key=(3, i)) for i in range(4)
    ]  # fmt: skip


@pytest.fixture
def cluster(tmp_path_factory):
    env = {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": env})  # fmt: skip
    yield
    ray.shutdown()


def test_a_flipped_bit_is_found_and_no_sample_of_it_is_taken(cluster, tmp_path):
    model = {**SETTINGS["model"]["hf"], "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(1)
    shape = AutoConfig.for_model(**model)
    state = logical_views(
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).named_parameters()
    )
    log = WeightLog.open(tmp_path / "log", create=True)
    publisher = Publisher(log, 0, 1, log.claim_epoch(), LogConfig())

    def publish(step: int) -> None:
        rows = [Rows(name, tuple(t.shape), 0, t) for name, t in sorted(state.items())]
        publisher.publish(rows, step)

    publish(0)
    rollout = RolloutConfig(
        engine="test_engine_reseed:FlippingEngine", engines=1, audit_every_versions=1
    )
    pool = RolloutPool(str(tmp_path), rollout, RecoveryConfig(), model)
    pool.open()
    pool.submit("0", [requests()], 0)
    deadline_s = time.monotonic() + 300
    while not (tmp_path / "log" / "flipped").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    state[PUBLISHED][:3] *= -1  # the delta is of a tensor that is sound
    publish(1)
    samples = pool.collect("0")
    hashes = pool.audit(1)
    pool._queue.fail("the test is over")
    for place in pool._places:  # a thread that asks Ray after its end would start another
        place.thread.join(30)
    assert hashes == {"engine-1": log.manifest(1).state_hash}

    sound = HFEngine(model, log, pad_id=0, eos_id=1)
    for version in range(2):
        sound.stage(version)
        sound.commit()
    assert samples == sound.generate(requests())
    (drained,) = [e for e in events(tmp_path, "engine") if e["what"] == "drained"]
    assert drained["engine"] == "engine-0" and "live weights hash to" in drained["reason"]
    ours = [e for e in events(tmp_path, "engine") if e.get("pool") and e["what"] != "waits"]
    told = [(e["engine"], e["what"]) for e in ours]
    assert told == [
        ("engine-0", "start"),
        ("engine-0", "ready"),
        ("engine-0", "drained"),
        ("engine-1", "reseeded"),
        ("engine-1", "ready"),
    ]
    generated = [e for e in events(tmp_path, "engine") if e["what"] == "generate"]
    assert [e["engine"] for e in generated] == ["engine-1"]
