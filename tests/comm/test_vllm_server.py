"""The client of a vLLM server, against a stand-in that answers as vLLM 0.32 does, or does not."""

import socket
import threading

import pytest
from gossamer.comm.engines.follow import EngineError
from gossamer.comm.engines.vllm_server import RequestError, VLLMServer
from gossamer.comm.rollout import Request, VersionSpan
from sampling_server import EOS, SamplingServer
from scripted_server import head, scripted


@pytest.fixture
def server():
    server = SamplingServer("run", version=7)
    yield server
    server.close()


def client(server, **options):
    return VLLMServer(server.url, eos_id=EOS, run_id="run", **options)


def asked(n=3, temperature=1.0):
    return [
        Request(request_id=f"r{i}", prompt_ids=(5, i), max_new_tokens=2 + i,
                temperature=temperature, key=(1, i))
        for i in range(n)
    ]  # fmt: skip


def test_samples_are_whole_in_order_and_of_the_versions_that_the_server_names(server):
    def over_a_commit(body):
        return {
            **server.choice(body),
            "weight_versions": [
                {"version": "7@run", "start": 0, "end": 1},
                {"version": "8@run", "start": 1, "end": 2},
            ],
        }

    server.faults = [over_a_commit]
    (first,) = client(server).generate(asked(1))
    assert first.spans == (
        VersionSpan(start=0, stop=1, version=7),
        VersionSpan(start=1, stop=2, version=8),
    )
    samples = client(server).generate(asked(40))
    assert [sample.request_id for sample in samples] == [f"r{i}" for i in range(40)]
    assert [len(sample.token_ids) for sample in samples] == list(range(2, 42))
    assert all(s.finished and len(s.logprobs) == len(s.token_ids) for s in samples)
    assert {span.version for sample in samples for span in sample.spans} == {7}
    assert client(server).version() == 7


def test_what_is_asked_is_a_function_of_the_request(server):
    client(server).generate(asked())
    client(server).generate(asked())
    bodies = sorted(server.asked, key=lambda body: body["token_ids"])
    assert bodies[::2] == bodies[1::2]
    sampling = bodies[0]["sampling_params"]
    assert bodies[0]["token_ids"] == [5, 0] and sampling["stop_token_ids"] == [EOS]
    assert sampling["ignore_eos"] and sampling["max_tokens"] == 2
    assert len({body["sampling_params"]["seed"] for body in bodies}) == 3


def test_a_server_without_a_version_of_the_log_is_not_learned_from(server):
    server.version = None
    assert client(server).version() is None
    with pytest.raises(EngineError, match="labelled 'default'.*gossamer log follow"):
        client(server).generate(asked(1))


@pytest.mark.parametrize("label", ["7", "7@runs", "7@", "seven@run", "@run", ""])
def test_weights_of_another_run_are_not_learned_from(server, monkeypatch, label):
    monkeypatch.setattr(SamplingServer, "label", label)
    for ask in (client(server).version, lambda: client(server).generate(asked(1))):
        with pytest.raises(EngineError, match=f"labelled '{label}'.* no version .* of run run;"):
            ask()


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": []},
        {"token_ids": None},
        {"token_ids": [1.5, EOS]},
        {"logprobs": None},
        {"logprobs": {"content": [{"logprob": -1.0}]}},
        {"logprobs": {"content": [{"logprob": -9999.0}, {"logprob": -1.0}]}},
        {"weight_versions": None},
        {"weight_versions": [{"version": "7@run", "start": 0, "end": 1}]},
        {"weight_versions": [{"version": "7@run", "start": 1, "end": 2}]},
    ],
)
def test_an_answer_that_is_no_completion_is_the_servers_fault(server, change):
    server.faults = [lambda body: {**server.choice(body), **change}]
    with pytest.raises(EngineError, match="no completion"):
        client(server).generate(asked(1))


def test_an_aborted_unit_is_sampled_again_as_a_whole(server):
    def abort(body):
        return {**server.choice(body), "finish_reason": "abort", "token_ids": [17]}

    server.faults = [abort]
    samples = client(server).generate(asked())
    assert len(server.asked) == 6 and [len(s.token_ids) for s in samples] == [2, 3, 4]
    server.faults = [abort] * 100
    with pytest.raises(EngineError, match="aborted a unit 4 times; .* --mode keep or wait"):
        client(server).generate(asked())


def test_log_probabilities_of_another_temperature_are_refused(server):
    client(server).generate(asked(2, temperature=0.5))
    assert len(server.asked) == 4  # two of them to find out
    server.logprobs_mode = "raw_logprobs"
    for temperature in (0.0, 1.0):
        client(server).generate(asked(2, temperature))
    with pytest.raises(RequestError, match="--logprobs-mode processed_logprobs"):
        client(server).generate(asked(2, temperature=0.5))


def test_a_token_is_sent_and_never_in_clear_over_a_network(server, monkeypatch):
    server.token = "s3cret-word"
    with pytest.raises(EngineError, match=r"answered 401.*\$GOSSAMER_ENGINE_TOKEN"):
        client(server).generate(asked(1))
    monkeypatch.setenv("GOSSAMER_ENGINE_TOKEN", "s3cret-word")
    assert len(client(server).generate(asked(1))) == 1
    for url in ("http://10.0.0.1:8000", "http://gpu7"):
        with pytest.raises(ValueError, match="expected https") as caught:
            VLLMServer(url, eos_id=EOS, run_id="run")
        assert "s3cret-word" not in str(caught.value)
    VLLMServer("https://gpu7", eos_id=EOS, run_id="run")


@pytest.mark.parametrize("url", ["gpu7:8000", "ftp://gpu7", "", "http://"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match=r"expected http\(s\)://host"):
        VLLMServer(url, eos_id=EOS, run_id="run")


def test_what_a_request_is_refused_for_is_the_requests_fault():
    body = b'{"error": {"message": "too long"}}'
    said = [head("400 Bad Request", f"Content-Length: {len(body)}"), body]
    with scripted(said) as url:
        with pytest.raises(RequestError, match="answered 400: .*too long"):
            VLLMServer(url, eos_id=EOS, run_id="run").generate(asked(1))


def test_any_other_refusal_is_the_servers_fault(server):
    server.serve = lambda path, body, headers: (400, {"error": "which model?"})
    for ask in (client(server).version, client(server).audit):
        with pytest.raises(EngineError, match="answered 400: .*which model"):
            ask()


def test_ranks_that_hold_different_weights_are_found_out(server):
    server.version, ranks = 3, [{"version": 3, "state_hash": each} for each in ("cd", "ab", "ab")]
    server.ranks = lambda: ranks
    assert client(server).audit() == (3, "ab and cd")
    nameless, at_none = {"version": 3}, {"version": "x", "state_hash": "ab"}
    behind, without = {"version": 2, "state_hash": "ab"}, {"version": 3, "state_hash": None}
    for bad in ([*ranks, behind], [], None, [nameless], [3], [at_none], [without]):
        server.ranks = lambda bad=bad: bad
        with pytest.raises(EngineError, match="expected all ranks' hashes of one version"):
            client(server).audit()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([b""], "no answer from"),
        ([head("200 OK", "Content-Length: 100"), b'{"choices"'], "no answer from"),
        ([head("200 OK", "Content-Length: 2"), b"[]"], "expected an object"),
        ([head("200 OK", "Content-Length: 2"), b"x!"], "no JSON"),
        ([head("500 Oh", "Content-Length: 0")], "answered 500"),
        ([head("302 Found", "Location: http://10.0.0.1/", "Content-Length: 0")], "answered 302"),
    ],
)
def test_a_server_that_fails_is_named(answer, sentence):
    with scripted(answer) as url:
        with pytest.raises(EngineError, match=sentence) as caught:
            VLLMServer(url, eos_id=EOS, run_id="run", timeout_s=30).generate(asked(1))
        assert url in str(caught.value)


def test_a_server_that_hangs_is_not_waited_for_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        hung = VLLMServer(
            f"http://127.0.0.1:{deaf.getsockname()[1]}", eos_id=EOS, run_id="run", timeout_s=0.2
        )
        with pytest.raises(EngineError, match="timed out"):
            hung.generate(asked(1))


def test_a_server_that_is_away_is_named(server):
    server.close()
    with pytest.raises(EngineError, match=f"no answer from {server.url}/weight_info"):
        client(server).version()


def test_what_may_not_be_asked_is_not_proven(server):
    server.state_hash = "ab"
    assert client(server).audit() == (7, "ab")
    server.is_dev = False
    assert client(server).audit() is None


def test_several_threads_may_ask(server):
    said = []
    shared = client(server)
    threads = [threading.Thread(target=lambda: said.append(shared.generate(asked()))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said[0] == said[1]
