"""What a pool asks of a vLLM server, over real HTTP, by a server that can be told to misbehave."""

import threading
from http.server import ThreadingHTTPServer

from json_server import JsonHandler

EOS = 1


class SamplingServer:
    """Every token is 10 + the version that sampled it, the last one the end of the sequence."""

    def __init__(self, run_id, version=None):
        self.run_id, self.version, self.state_hash = run_id, version, None
        self.token, self.asked = None, []
        self.is_dev = True
        self.logprobs_mode = "processed_logprobs"
        self.faults = []
        """Functions of a body; each is called for one request and may raise, or answer a choice."""
        self.begin()

    def begin(self, port=0):
        server = self

        class Handler(JsonHandler):
            def do_GET(self):  # noqa: N802
                self.answer(self.path, None)

            def do_POST(self):  # noqa: N802
                self.answer(self.path, self.body())

            def answer(self, path, body):
                try:
                    status, found = server.serve(path, body, self.headers)
                except ConnectionError:
                    return self.connection.close()
                self.reply(status, found)

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self._http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def serve(self, path, body, headers):
        guarded = path.startswith("/inference")
        if guarded and self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Unauthorized"}
        if path == "/weight_info":
            return 200, {"weight_version": self.label}
        if path == "/collective_rpc" and self.is_dev:
            assert body["method"] == "gossamer_audit"
            return 200, {"results": self.ranks()}
        if path == "/inference/v1/generate":
            self.asked.append(body)
            fault = self.faults.pop(0) if self.faults else None
            return 200, {"choices": [(fault and fault(body)) or self.choice(body)]}
        return 404, {"detail": "Not Found"}

    def ranks(self):
        return [{"version": self.version, "state_hash": self.state_hash}]

    @property
    def label(self):
        return "default" if self.version is None else f"{self.version}@{self.run_id}"

    def choice(self, body):
        sampling = body["sampling_params"]
        tokens = [10 + (self.version or 0)] * (sampling["max_tokens"] - 1) + [EOS]
        told = sampling["temperature"] if self.logprobs_mode == "processed_logprobs" else 1.0
        content = [
            {"token_id": t, "logprob": -told, "top_logprobs": [{"token_id": t, "logprob": -told}]}
            for t in tokens
        ]
        spans = [{"version": self.label, "start": 0, "end": len(tokens)}]
        return {
            "index": 0,
            "finish_reason": "stop",
            "token_ids": tokens,
            "logprobs": {"content": content},
            "weight_versions": spans,
        }
