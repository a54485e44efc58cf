"""A service that judges completions, well or badly, on a port of this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


def exactly(handler: BaseHTTPRequestHandler, asked: dict) -> None:
    """Answers as exact_match would."""
    is_right = asked["finished"] and asked["completion"].strip() == asked["answer"]
    answer(handler, 200, json.dumps({"score": 1.0 if is_right else 0.0}).encode())


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, pause_s: float = 0) -> None:
    """Sends the body, with a pause before each of its bytes if told so."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    for byte in body if pause_s else ():
        time.sleep(pause_s)
        handler.wfile.write(bytes([byte]))
    if not pause_s:
        handler.wfile.write(body)


@contextmanager
def serve_rewards(
    judge: Callable[[BaseHTTPRequestHandler, dict], None] = exactly,
) -> Iterator[str]:
    """The address of a server that hands what it is asked to `judge`, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            length = int(self.headers["Content-Length"])
            try:
                judge(self, json.loads(self.rfile.read(length)))
            except OSError:
                pass  # whoever asked has gone

        def log_message(self, format: str, *arguments: object) -> None: ...  # noqa: A002

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/judge/sums"
    finally:
        server.shutdown()
        server.server_close()
