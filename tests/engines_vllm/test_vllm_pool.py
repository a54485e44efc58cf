"""A real vLLM server as an engine of a pool: it follows a log, is killed, and comes back empty."""

import importlib
import threading
from dataclasses import replace
from functools import partial

import pytest
import waiting
from gossamer.comm.engines.follow import follow
from gossamer.comm.engines.vllm_server import RequestError, VLLMServer
from gossamer.launch.config import PoolConfig, RecoveryConfig, RolloutConfig
from gossamer.launch.rollout_pool import RolloutPool
from tiny_models import EOS, SMALL, Trained, requests
from tiny_run import events
from vllm_here import VLLM, vllm_here  # noqa: F401
from vllm_serving import free_port, save_tokenizer, start_server, stop, wait_until_it_runs

pytestmark = VLLM
SERVES = ("--enable-scale-out",)
EXACT = ("--logprobs-mode", "processed_logprobs", "--no-enable-prefix-caching")
FLAGS = (*SERVES, *EXACT, "--api-key", "word")
MODEL = {"pad_token_id": 0, "eos_token_id": EOS}


@pytest.fixture
def trained(tmp_path):
    trained = Trained("qwen3_moe", tmp_path)
    save_tokenizer(trained.folder)
    return trained


wait_until = partial(waiting.wait_until, patience_s=300, every_s=0.05)


class Served:
    """A server, what keeps it at the head of the log, and a pool whose only engine it is."""

    def __init__(self, trained, run_dir):
        port = free_port()
        self.name, self.url = f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"
        self._trained, self._port, self._is_over = trained, port, threading.Event()
        self.begin()
        how = {"until": lambda _: self._is_over.is_set()}
        self._follower = threading.Thread(
            target=follow, args=(trained.log.url, self.url), kwargs=how
        )
        self._follower.start()
        rollout = RolloutConfig(pools=(PoolConfig(name="far", urls=(self.url,)),))
        self.pool = RolloutPool(str(run_dir), rollout, RecoveryConfig(), MODEL)
        self.pool.open()

    def begin(self):
        self.process = start_server(self._trained.folder, self._port, *FLAGS)

    def submit_long(self, batch, oldest_version):
        asked = enumerate(requests(2))
        unit = [replace(each, max_new_tokens=1000, key=(9, i)) for i, each in asked]
        self.pool.submit(batch, [unit], oldest_version)
        wait_until_it_runs(self.url)

    def close(self):
        self._is_over.set()
        self.pool._queue.fail("the test is over")
        stop(self.process)
        self._follower.join(30)


@pytest.fixture
def served(trained, tmp_path, monkeypatch, vllm_here):  # noqa: F811
    monkeypatch.setenv("GOSSAMER_ENGINE_TOKEN", "word")
    served = Served(trained, tmp_path)
    yield served
    served.close()


def test_a_server_samples_for_a_pool(trained, served, tmp_path):
    pool, proof = served.pool, {served.name: ""}
    pool.submit("0", [requests(4), requests(2)], 0)
    samples = pool.collect("0")
    assert samples[:2] == samples[4:]  # a function of the requests, as long as nothing else runs
    assert {(s.start, s.version) for sample in samples for s in sample.spans} == {(0, 0)}

    # in flight over commits: the server says which token is of which version
    for attempt in range(20):  # until a commit lands before the samples are done
        served.submit_long(f"1-{attempt}", 0)
        trained.step()
        longest = max(pool.collect(f"1-{attempt}"), key=lambda sample: len(sample.spans))
        versions = [span.version for span in longest.spans]
        if len(versions) > 1:
            break
    assert len(versions) > 1 and versions == sorted(set(versions))
    head = trained.log.head()
    server = VLLMServer(served.url, eos_id=EOS, run_id=trained.log.run_id)
    wait_until(lambda: server.version() == head)
    proof[served.name] = trained.log.manifest(head).state_hash
    assert pool.audit(head) == proof

    # the same tokens and log-probabilities as an engine in this process, at every temperature
    cool = [replace(each, temperature=t) for t in (0.0, 0.7) for each in requests(3)]
    cool = [replace(each, request_id=f"{i}") for i, each in enumerate(cool)]
    pool.submit("2", [[each] for each in cool], head)
    engine = in_this_process(trained, head)
    for asked, sample in zip(cool, pool.collect("2"), strict=True):
        (expected,) = engine.generate([asked])
        assert sample.token_ids == expected.token_ids and sample.finished == expected.finished
        assert sample.logprobs == pytest.approx(expected.logprobs, abs=1e-3), asked

    # killed in the middle of a unit, and started again with nothing but its first weights
    served.submit_long("3", head)
    served.process.kill()
    served.process.wait()
    wait_until(lambda: any(e["what"] == "dead" for e in events(tmp_path, "engine")))
    served.begin()
    assert {s.version for sample in pool.collect("3") for s in sample.spans} == {head}
    assert pool.audit(head) == proof
    waits = [e["waits_for"] for e in events(tmp_path, "engine") if e["what"] == "waits"]
    assert any("no answer" in each for each in waits), waits


def in_this_process(trained, version):
    module = importlib.import_module("gossamer.comm.engines.vllm_offline")
    engine = module.VLLMEngine(trained.config, trained.log, pad_id=0, eos_id=EOS, options=SMALL)
    for each in range(version + 1):
        engine.stage(each)
        engine.commit()
    return engine


def test_a_server_with_raw_log_probabilities_is_refused(trained):
    port = free_port()
    process = start_server(trained.folder, port, *SERVES)
    try:
        server = VLLMServer(f"http://127.0.0.1:{port}", eos_id=EOS, run_id=trained.log.run_id)

        def is_up():
            try:
                return server.version() is None
            except Exception:
                return False

        wait_until(is_up)
        warm = [replace(each, temperature=0.7) for each in requests(1)]
        with pytest.raises(RequestError, match="--logprobs-mode processed_logprobs"):
            server.generate(warm)
    finally:
        stop(process)
