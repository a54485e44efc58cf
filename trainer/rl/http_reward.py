"""A reward that a service tells: one POST a completion, with a deadline.

The one idea: whatever a server does (hang, drip, fail, lie), the trainer waits no longer than
`attempts * timeout_s` and its pauses, and learns from nothing but a number in the agreed place.
Redirects are refused, for they would take the token elsewhere.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from contextlib import suppress
from threading import Timer
from typing import Any
from urllib.parse import urlsplit

from gossamer.trainer.config import TrainConfig
from gossamer.trainer.rl.reward import RewardError
from gossamer.trainer.task import Problem

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TRIED_AGAIN = (408, 429, 500, 502, 503, 504)
MAX_ANSWER_BYTES = 1 << 16
PAUSE_S = 0.2
"""Before the second attempt; doubled before each further one."""


class HTTPReward:
    """Reward; safe in several threads, each call has a connection of its own.

    Raises ValueError for a token that would cross a network in clear.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.rl.http is not None  # RLConfig checks it
        self._config = config.rl.http
        parts = urlsplit(self._config.url)
        self._is_tls, self._host = parts.scheme == "https", parts.hostname or ""
        self._port = parts.port
        self._target = parts.path or "/"
        self._headers = {"Content-Type": "application/json"}
        token = os.environ.get(self._config.token_variable)
        if token:
            if not self._is_tls and self._host not in LOOPBACK:
                raise ValueError(
                    f"rl.http.url is http to {self._host} and {self._config.token_variable} is"
                    " set; expected https, or a token would cross the network in clear"
                )
            self._headers["Authorization"] = f"Bearer {token}"

    def __call__(self, completion: str, problem: Problem, finished: bool) -> float:
        """The service's score. Raises RewardError once all attempts have failed."""
        asked = {
            "question": problem.question,
            "answer": problem.answer,
            "completion": completion,
            "finished": finished,
        }
        body, fault = json.dumps(asked).encode(), ""
        for attempt in range(self._config.attempts):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                status, answer = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                fault = str(error) or type(error).__name__
                continue
            if status == 200:
                return self._score_of(answer)
            fault = f"status {status}"
            if status not in TRIED_AGAIN:
                break
        raise RewardError(f"rl.http.url {self._host} did not judge {problem.problem_id}: {fault}")

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """(status, what was answered), within timeout_s from connecting to the last byte."""
        kind: Any = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        options = {"context": ssl.create_default_context()} if self._is_tls else {}
        timeout_s = self._config.timeout_s
        deadline_s = time.monotonic() + timeout_s
        connection = kind(self._host, self._port, timeout=timeout_s, **options)
        connection.connect()
        # a socket's timeout is one read's, and a server that drips has many
        timer = Timer(deadline_s - time.monotonic(), _cut, (connection.sock,))
        timer.start()
        try:
            connection.request("POST", self._target, body, self._headers)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES)
        finally:
            timer.cancel()
            connection.close()
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"no whole answer in {timeout_s} s")
        return response.status, answer

    def _score_of(self, answer: bytes) -> float:
        try:
            score = json.loads(answer)["score"]
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise TypeError
            return float(score)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RewardError(
                f'rl.http.url {self._host} answered {answer[:60]!r}; expected {{"score": number}}'
            ) from None


def _cut(connected: socket.socket) -> None:
    """Ends whatever another thread is waiting for on the socket."""
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
