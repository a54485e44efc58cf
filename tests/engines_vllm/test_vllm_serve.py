"""A real server, and what keeps it at the head of a log."""

import importlib
import json
import threading
import urllib.request

import pytest
from gossamer.comm.engines.follow import EngineError, Server, follow
from tiny_models import EOS, SMALL, Trained, requests
from vllm_here import VLLM, vllm_here  # noqa: F401
from vllm_serving import free_port, save_tokenizer, start_server, stop, wait_until_it_runs

pytestmark = VLLM
PATIENCE_S = 300


@pytest.fixture
def trained(tmp_path):
    trained = Trained("qwen3_moe", tmp_path)
    save_tokenizer(trained.folder)
    return trained


@pytest.fixture
def url(trained):
    port = free_port()
    server = start_server(trained.folder, port)
    yield f"http://127.0.0.1:{port}"
    stop(server)


def complete(url, prompt_ids, max_tokens):
    body = {
        "model": "tiny",
        "prompt": list(prompt_ids),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return Server(url, PATIENCE_S).post("/v1/completions", body)["choices"][0]


def test_a_server_follows_a_log(trained, url, vllm_here):  # noqa: F811
    told = []

    def follow_to_the_head(mode="keep"):
        head = trained.log.head()
        follow(
            trained.log.url,
            url,
            mode=mode,
            on_progress=told.append,
            until=lambda live: live == head,
            audit_every_versions=1,
        )

    follow_to_the_head()
    told[:] = [each for each in told if each.event != "failed"]  # it was not up yet
    assert [each.event for each in told] == ["started", "committed"]
    for _ in range(3):
        trained.step()
    long = []
    thread = threading.Thread(target=lambda: long.append(complete(url, (3, 4, 5), 400)))
    thread.start()
    wait_until_it_runs(url)
    follow_to_the_head()
    thread.join()
    assert len(long[0]["token_ids"]) == 400  # in flight over three commits
    assert [each.version for each in told[2:]] == [1, 2, 3]
    assert all(0 < each.commit_s < each.pause_s for each in told[1:]), told
    with urllib.request.urlopen(f"{url}/weight_info") as answer:
        assert json.load(answer) == {"weight_version": f"3@{trained.log.run_id}"}
    (audit,) = Server(url, 60).rpc("gossamer_audit")
    assert audit == {"version": 3, "state_hash": trained.log.manifest(3).state_hash}
    with pytest.raises(EngineError, match="start_weight_update must be called"):
        Server(url, 60).post("/update_weights", {"update_info": {"version": 4}})
    with pytest.raises(EngineError, match="start vLLM with --weight-transfer-config"):
        Server(url, 60).rpc("gossamer_of_another_age")

    module = importlib.import_module("gossamer.comm.engines.vllm_offline")
    engine = module.VLLMEngine(trained.config, trained.log, pad_id=0, eos_id=EOS, options=SMALL)
    for version in range(4):
        engine.stage(version)
        engine.commit()
    for asked, sample in zip(requests(2), engine.generate(requests(2)), strict=True):
        assert tuple(complete(url, asked.prompt_ids, 24)["token_ids"]) == sample.token_ids

    # what is to be aborted must not end by itself before
    for mode, reason, num_tokens in (("wait", "length", 500), ("abort", "abort", 4000)):
        trained.step()
        ended = []
        asked = (url, (3, 4, 5), num_tokens)
        thread = threading.Thread(target=lambda: ended.append(complete(*asked)))  # noqa: B023
        thread.start()
        wait_until_it_runs(url)
        follow_to_the_head(mode)
        thread.join()
        assert ended[0]["finish_reason"] == reason
        assert (len(ended[0]["token_ids"]) == num_tokens) == (mode == "wait"), mode
        assert told[-1].event == "committed"
