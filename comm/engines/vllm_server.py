"""Samples from a running vLLM server over HTTP: token ids in; token ids, log-probs, versions out.

The one idea: the server says which weights made which token. vLLM attaches to each step's tokens
the label that `/finish_weight_update` set while generation was paused, `/inference/v1/generate`
returns them as spans, and `gossamer log follow` makes the label of the version and the log's run.
So nothing is guessed from what was so before and after, and a server without a version, or with
one of another run, is found out.

Start it with `--enable-scale-out` (or that route is closed), `--logprobs-mode processed_logprobs`
and `--no-enable-prefix-caching`; docs/rollouts.md says why, and what is not promised.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

from gossamer.comm.engines.follow import EngineError
from gossamer.comm.rollout import Request, Sample, VersionSpan

TOKEN_VARIABLE = "GOSSAMER_ENGINE_TOKEN"
"""What `vllm serve --api-key` was given."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECTIONS = 64
"""Requests of a unit that are on their way at once."""
LOOK_S = 10.0
"""Patience for answers that need no sampling."""
UNLABELLED = "default"
"""vLLM's word for weights that no follower brought."""
ABORTS = 3
"""How often a unit that the server's follower aborted is sampled again."""
SURE = 0.1
"""Nearer to 0 a log-probability at temperature 1 does not show what temperature does to it."""
NO_LOGPROB = -9999.0
"""vLLM's word for a log-probability that it does not have."""
GENERATE = "/inference/v1/generate"
NOT_PASSED = (401, 403, 404, 405)
"""What a proxy answers for routes that are not for everybody."""


class RequestError(ValueError):
    """A request that the server refuses for what it asks."""


class VLLMServer:
    """Client of one server, for several threads. Raises EngineError for what is the server's."""

    def __init__(self, url: str, *, eos_id: int, run_id: str, timeout_s: float = 600.0) -> None:
        """run_id: of the log that it is to follow. timeout_s: for one completion.

        Raises ValueError for a URL that cannot be used.
        """
        self.url = url.rstrip("/")
        self._place = urlsplit(self.url)
        if self._place.scheme not in ("http", "https") or not self._place.hostname:
            raise ValueError(f"engine {url!r}: expected http(s)://host[:port][/path]")
        self._headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN_VARIABLE):
            if self._place.scheme == "http" and self._place.hostname not in LOOPBACK:
                raise ValueError(
                    f"engine {url} is http and {TOKEN_VARIABLE} is set; expected https, or a token"
                    " would cross the network in clear"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        self._eos_id, self._run_id, self._timeout_s = eos_id, run_id, timeout_s
        self._is_checked = False

    def version(self) -> int | None:
        """The version of the log that it serves; None before its follower brought one.

        Raises EngineError for weights of another log.
        """
        label = self._json("GET", "/weight_info", None, LOOK_S).get("weight_version")
        return None if label == UNLABELLED else self._version_of(label)

    def audit(self) -> tuple[int | None, str] | None:
        """(version, state hash) of the live weights, read in full; None where it may not be asked.

        Of ranks that hold different weights it is all their hashes, which is no version's. Raises
        EngineError for ranks at different versions.
        """
        body = {"method": "gossamer_audit", "args": []}
        status, answer = self._ask("POST", "/collective_rpc", body, self._timeout_s)
        if status in NOT_PASSED:
            return None
        found = self._read("/collective_rpc", status, answer)
        try:
            (version,) = {rank["version"] for rank in found["results"]}
            hashes = " and ".join(sorted({rank["state_hash"] for rank in found["results"]}))
            return None if version is None else int(version), hashes
        except (KeyError, TypeError, ValueError):
            said = f"{self.url}/collective_rpc answered {str(found)[:300]}"
            raise EngineError(f"{said}; expected all ranks' hashes of one version") from None

    def generate(self, requests: list[Request]) -> list[Sample]:
        """One completion a request, in their order.

        What the server's follower does to those in the making is its `--mode`: where it aborts one,
        all are sampled again. Raises RequestError, EngineError.
        """
        warm = [each for each in requests if each.temperature not in (0.0, 1.0)]
        if warm and not self._is_checked:
            self._check_logprobs(warm[0])
        for _ in range(1 + ABORTS):
            with ThreadPoolExecutor(min(CONNECTIONS, max(1, len(requests)))) as threads:
                answers = list(threads.map(self._sample, requests))
            samples = [each for each in answers if each is not None]
            if len(samples) == len(requests):
                return samples
        raise EngineError(
            f"{self.url} aborted a unit {1 + ABORTS} times; expected `gossamer log follow` with"
            " --mode keep or wait"
        )

    def _sample(self, request: Request) -> Sample | None:
        """None for one that was aborted."""
        choice = self._complete(request, logprobs=0)
        if choice.get("finish_reason") == "abort":
            return None
        try:
            tokens = tuple(choice["token_ids"])
            content = choice["logprobs"]["content"]
            sample = Sample(
                request_id=request.request_id,
                token_ids=tokens,
                logprobs=tuple(float(each["logprob"]) for each in content),
                spans=tuple(self._span(each) for each in choice["weight_versions"]),
                finished=tokens[-1] == self._eos_id,
            )
            edges = [0, *(span.stop for span in sample.spans)]
            if edges[-1] != len(tokens) or edges[:-1] != [span.start for span in sample.spans]:
                raise ValueError("spans that do not cover its tokens")
            if len(content) != len(tokens) or not all(type(token) is int for token in tokens):
                raise ValueError("as many log-probabilities as tokens were expected")
            if min(sample.logprobs) <= NO_LOGPROB:
                raise ValueError("a token without log-probability")
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise EngineError(f"{self.url} answered what is no completion: {error!r}") from error
        return sample

    def _span(self, told: dict[str, Any]) -> VersionSpan:
        version = self._version_of(told["version"])
        return VersionSpan(start=told["start"], stop=told["end"], version=version)

    def _version_of(self, label: object) -> int:
        version, _, run_id = str(label).partition("@")
        if not version.isdecimal() or run_id != self._run_id:
            raise EngineError(
                f"{self.url} serves weights labelled {label!r}, which are no version of the log of"
                f" run {self._run_id}; expected `gossamer log follow` of that log beside it"
            )
        return int(version)

    def _complete(self, request: Request, logprobs: int) -> dict[str, Any]:
        words = ",".join(str(int(word)) for word in request.key).encode()
        sampling = {
            "temperature": request.temperature,
            "max_tokens": request.max_new_tokens,
            "seed": int.from_bytes(blake2b(words, digest_size=7).digest(), "little"),
            "stop_token_ids": [self._eos_id],
            "ignore_eos": True,
            "logprobs": logprobs,
            "detokenize": False,
        }
        body = {"token_ids": list(request.prompt_ids), "sampling_params": sampling}
        answer = self._json("POST", GENERATE, body, self._timeout_s)
        try:
            (choice,) = answer["choices"]
            return {**choice}
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.url} answered no completion: {error!r}") from error

    def _check_logprobs(self, request: Request) -> None:
        """Raises RequestError where log-probabilities are not those of the sampling distribution.

        At a very low temperature the most likely token's is then close to 0. Two are asked for, as
        the sampled one counts as one.
        """
        tops = []
        for temperature in (1.0, 0.01):
            probe = replace(request, max_new_tokens=1, temperature=temperature)
            try:
                (content,) = self._complete(probe, logprobs=2)["logprobs"]["content"]
                tops.append(max(top["logprob"] for top in content["top_logprobs"]))
            except (KeyError, TypeError, ValueError) as error:
                raise EngineError(f"{self.url} answered no completion: {error!r}") from error
        if tops[0] > -SURE:
            return  # sure of its token at any temperature: the next unit may tell
        if abs(tops[1] - tops[0]) < abs(tops[0]) / 2:
            raise RequestError(
                f"{self.url} reports log-probabilities of temperature 1 where {request.temperature}"
                " is asked; expected it to be started with --logprobs-mode processed_logprobs"
            )
        self._is_checked = True

    def _json(self, method: str, path: str, body: object, timeout_s: float) -> dict[str, Any]:
        return self._read(path, *self._ask(method, path, body, timeout_s))

    def _read(self, path: str, status: int, answer: bytes) -> dict[str, Any]:
        said = f"{self.url}{path} answered {status}: {answer[:300].decode(errors='replace')}"
        if status in (400, 413, 422) and path == GENERATE:
            raise RequestError(said)
        if status == 401:
            raise EngineError(f"{said}; expected its --api-key in ${TOKEN_VARIABLE}")
        if status == 404 and path == "/weight_info":
            raise EngineError(f"{said}; expected vLLM with VLLM_SERVER_DEV_MODE=1, or a proxy"
                              " that passes it on")  # fmt: skip
        if status != 200:
            raise EngineError(said)
        try:
            found = json.loads(answer)
        except ValueError:
            raise EngineError(f"{said}, which is no JSON") from None
        if not isinstance(found, dict):
            raise EngineError(f"{said}; expected an object")
        return found

    def _ask(self, method: str, path: str, body: object, timeout_s: float) -> tuple[int, bytes]:
        """(status, what was answered); a connection of its own. Raises EngineError."""
        kind: Any = http.client.HTTPConnection
        options: dict[str, Any] = {}
        if self._place.scheme == "https":
            kind, options = http.client.HTTPSConnection, {"context": ssl.create_default_context()}
        host = self._place.hostname
        connection = kind(host, self._place.port, timeout=min(LOOK_S, timeout_s), **options)
        text = None if body is None else json.dumps(body)
        try:
            connection.connect()
            _watch(connection.sock, timeout_s)
            connection.request(method, self._place.path + path, text, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise EngineError(f"no answer from {self.url}{path}: {why}") from error
        finally:
            connection.close()


def _watch(connected: socket.socket, timeout_s: float) -> None:
    """A host that vanished says nothing; the kernel asks it every few seconds."""
    connected.settimeout(timeout_s)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # Linux
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
