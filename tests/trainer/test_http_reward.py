"""The reward that a service tells, and services that do what they should not."""

import threading
import time

import pytest
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.rl.config import HTTPRewardConfig, RLConfig
from gossamer.trainer.rl.reward import RewardError, build_reward
from gossamer.trainer.task import Problem
from reward_server import answer, exactly, serve_rewards

PROBLEM = Problem(problem_id=3, question="8 + 9 =", answer="17")
TOKEN = "GOSSAMER_REWARD_TOKEN"


def build(url, **options):
    settings = {
        "model": {"hf": {"model_type": "qwen3_moe"}},
        "data": {"task_share": 0.0},
        "rl": {"reward": "http", "http": {"url": url, **options}},
        "phases": [{"name": "text", "kind": "next_token", "max_steps": 1, "lr": 0.1}],
    }
    return build_reward(build_config(TrainConfig, settings, "train"))


def test_it_is_sent_what_was_asked_and_the_token(monkeypatch):
    seen = []

    def judge(handler, asked):
        seen.append((handler.path, handler.headers["Authorization"], asked))
        exactly(handler, asked)

    with serve_rewards(judge) as url:
        assert build(url)("17", PROBLEM, True) == 1.0
        monkeypatch.setenv(TOKEN, "s3cret")
        assert build(url)("71", PROBLEM, True) == 0.0
    told = {"question": "8 + 9 =", "answer": "17", "finished": True}
    assert seen == [
        ("/judge/sums", None, {**told, "completion": "17"}),
        ("/judge/sums", "Bearer s3cret", {**told, "completion": "71"}),
    ]


def test_what_may_pass_is_tried_again():
    asked = []

    def judge(handler, request):
        asked.append(request)
        if len(asked) < 3:
            answer(handler, 503, b"busy")
        else:
            exactly(handler, request)

    with serve_rewards(judge) as url:
        assert build(url)("17", PROBLEM, True) == 1.0
        assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "body", "asked", "sentence"),
    [
        (503, b"busy", 2, "did not judge 3: status 503"),
        (401, b"who?", 1, "did not judge 3: status 401"),
        (302, b"", 1, "did not judge 3: status 302"),
        (200, b"fine", 1, r"answered b'fine'; expected \{"),
        (200, b'{"score": "1"}', 1, "expected .*score"),
        (200, b'{"score": true}', 1, "expected .*score"),
        (200, b"[" * 70000, 1, "expected .*score"),
    ],
)
def test_a_service_that_does_not_tell_a_score(status, body, asked, sentence):
    seen = []

    def judge(handler, request):
        seen.append(request)
        answer(handler, status, body)

    with serve_rewards(judge) as url, pytest.raises(RewardError, match=sentence):
        build(url, attempts=2)("17", PROBLEM, True)
    assert len(seen) == asked


@pytest.mark.parametrize("kind", ["hangs", "drips", "drips its head"])
def test_nobody_waits_longer_than_the_timeout(kind):
    is_over = threading.Event()

    def judge(handler, asked):
        """Without end, so that a bound is none of this machine's speed."""
        begun = {
            "hangs": b"",
            "drips": b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
            "drips its head": b"HTTP/1.1 200 OK\r\nX: ",
        }[kind]
        handler.wfile.write(begun)
        while not is_over.wait(0.1):
            handler.wfile.write(b" " if begun else b"")

    with serve_rewards(judge) as url:
        reward = build(url, attempts=2, timeout_s=0.4)
        start_s = time.monotonic()
        try:
            with pytest.raises(RewardError, match=r"no whole answer in 0.4 s|timed out"):
                reward("17", PROBLEM, True)
            assert time.monotonic() - start_s < 20
        finally:
            is_over.set()


def test_nobody_there():
    with serve_rewards() as url:
        pass
    with pytest.raises(RewardError, match="did not judge 3: .*refused"):
        build(url, attempts=1)("17", PROBLEM, True)


def test_a_token_crosses_no_network_in_clear(monkeypatch):
    monkeypatch.setenv(TOKEN, "s3cret")
    with pytest.raises(ValueError, match="rl.http.url is http to judge.example .*expected https"):
        build("http://judge.example/x")
    build("https://judge.example/x")


@pytest.mark.parametrize(
    ("build_bad", "sentence"),
    [
        (lambda: HTTPRewardConfig(url="ftp://host/x"), "rl.http.url is not http"),
        (lambda: HTTPRewardConfig(url="http://me:pw@host/x"), "rl.http.url is not .*user name"),
        (lambda: HTTPRewardConfig(url="https://host/x?code=pw"), "rl.http.url is not .*a query"),
        (lambda: HTTPRewardConfig(url="http://h", timeout_s=0), "rl.http.timeout_s is 0"),
        (lambda: HTTPRewardConfig(url="http://h", attempts=0), "rl.http.attempts is 0"),
        (lambda: RLConfig(reward="http"), "rl.http is missing"),
    ],
)
def test_what_cannot_be_right_is_refused(build_bad, sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        build_bad()
    assert "pw" not in str(told.value)
