"""A real vLLM server as an engine of a pool: it follows a log, is killed, and comes back empty."""

import importlib
import threading
import time
from dataclasses import replace

import pytest
from gossamer.comm.engines.follow import follow
from gossamer.comm.engines.vllm_server import RequestError, VLLMServer
from gossamer.launch.config import PoolConfig, RecoveryConfig, RolloutConfig
from gossamer.launch.rollout_pool import RolloutPool
from tiny_models import EOS, SMALL, Trained, requests
from tiny_run import events
from vllm_here import VLLM, vllm_here  # noqa: F401
from vllm_serving import free_port, save_tokenizer, start_server

pytestmark = [*VLLM, pytest.mark.timeout(300)]
SERVES = ("--enable-scale-out",)
EXACT = ("--logprobs-mode", "processed_logprobs", "--no-enable-prefix-caching")
FLAGS = (*SERVES, *EXACT, "--api-key", "word")
MODEL = {"pad_token_id": 0, "eos_token_id": EOS}


@pytest.fixture
def trained(tmp_path):
    trained = Trained("qwen3_moe", tmp_path)
    save_tokenizer(trained.folder)
    return trained


def wait_until(holds):
    deadline_s = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_server_samples_for_a_pool(trained, tmp_path, monkeypatch, vllm_here):  # noqa: F811
    monkeypatch.setenv("GOSSAMER_ENGINE_TOKEN", "word")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start_server(trained.folder, port, *FLAGS)
    is_over = threading.Event()
    follower = threading.Thread(
        target=follow, args=(trained.log.url, url), kwargs={"until": lambda _: is_over.is_set()}
    )
    follower.start()
    rollout = RolloutConfig(pools=(PoolConfig(name="far", urls=(url,)),))
    pool = RolloutPool(str(tmp_path), rollout, RecoveryConfig(), MODEL)
    pool.open()
    try:
        pool.submit("0", [requests(4), requests(2)], 0)
        samples = pool.collect("0")
        assert samples[:2] == samples[4:]  # alone in their batches: a function of the requests
        assert {(s.start, s.version) for sample in samples for s in sample.spans} == {(0, 0)}

        # in flight over commits: the server says which token is of which version
        def long(batch, oldest):
            asked = [
                replace(each, max_new_tokens=400, key=(9, i)) for i, each in enumerate(requests(2))
            ]
            pool.submit(batch, [asked], oldest)

        long("1", 0)
        time.sleep(0.5)
        for _ in range(3):
            trained.step()
        found = pool.collect("1")
        spans = [(s.start, s.stop, s.version) for s in max(found, key=lambda s: len(s.spans)).spans]
        assert spans[0][0] == 0 and len(spans) > 1, spans
        assert [each[2] for each in spans] == sorted({each[2] for each in spans})
        wait_until(lambda: VLLMServer(url, eos_id=EOS).version() == 3)
        assert pool.audit(3) == {f"127.0.0.1:{port}": trained.log.manifest(3).state_hash}

        # the same tokens and log-probabilities as an engine in this process, at every temperature
        cool = [replace(each, temperature=t) for t in (0.0, 0.7) for each in requests(3)]
        cool = [replace(each, request_id=f"{i}") for i, each in enumerate(cool)]
        pool.submit("2", [[each] for each in cool], 3)
        engine = in_this_process(trained, 3)
        for asked, sample in zip(cool, pool.collect("2"), strict=True):
            (expected,) = engine.generate([asked])
            assert sample.token_ids == expected.token_ids and sample.finished == expected.finished
            assert sample.logprobs == pytest.approx(expected.logprobs, abs=1e-3), asked

        # killed in the middle of a unit, and started again with nothing but its first weights
        long("3", 3)
        time.sleep(0.5)
        process.kill()
        process.wait()
        wait_until(lambda: any(e["what"] == "dead" for e in events(tmp_path, "engine")))
        process = start_server(trained.folder, port, *FLAGS)
        assert {s.version for sample in pool.collect("3") for s in sample.spans} == {3}
        assert pool.audit(3) == {f"127.0.0.1:{port}": trained.log.manifest(3).state_hash}
    finally:
        is_over.set()
        pool._queue.fail("the test is over")
        process.terminate()
        process.wait(timeout=60)
        follower.join(30)
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
        server = VLLMServer(f"http://127.0.0.1:{port}", eos_id=EOS)

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
        process.terminate()
        process.wait(timeout=60)
