"""Serves any store over HTTP, read only: what `gossamer log serve` runs and HttpStore reads.

The one idea: every file but a hint is written once, so it may be cached for ever by whoever stands
in between, and a range of it is the same bytes today and tomorrow.

    GET, HEAD /NAME        a file, or a range of it
    GET /?list=PREFIX      names as a JSON list
"""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gossamer.comm.store import Store, checked_name
from gossamer.comm.store.http import TOKEN_VARIABLE

WRITTEN_ONCE = re.compile(r"(manifest|epoch|fold)-[\d-]+\.json|parts/.+")
"""Files that never change. log.json is not one: a new run may take the place of an old one."""

CHUNK_BYTES = 8 << 20
SILENCE_S = 60.0


class LogServer(ThreadingHTTPServer):
    """A server that answers in threads of its own until `close`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, store: Store, host: str, port: int, token: str | None) -> None:
        super().__init__((host, port), _Handler)
        self.store = store
        self.token = token
        self.url = f"http://{host}:{self.server_port}"
        self._open: set[socket.socket] = set()
        self._loop = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._loop.start()

    def close(self) -> None:
        """Stops listening and hangs up on everyone."""
        self.shutdown()
        self._loop.join()
        self.server_close()
        for each in list(self._open):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it hung up first

    def get_request(self) -> tuple[socket.socket, Any]:
        """See socketserver: one more connection."""
        request, address = super().get_request()
        self._open.add(request)
        return request, address

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401, a socket
        """See socketserver: one connection fewer."""
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """See socketserver: a reader that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: LogServer
    protocol_version = "HTTP/1.1"
    server_version = "gossamer"
    disable_nagle_algorithm = True
    timeout = SILENCE_S

    def do_GET(self) -> None:  # noqa: N802, http.server calls it
        self._reply(with_body=True)

    def do_HEAD(self) -> None:  # noqa: N802, http.server calls it
        self._reply(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _reply(self, with_body: bool) -> None:
        token, said = self.server.token, self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
            return self._refuse(HTTPStatus.UNAUTHORIZED)
        target = urlsplit(self.path)
        try:
            if target.path == "/":
                prefix = parse_qs(target.query, keep_blank_values=True).get("list", [""])[0]
                names = [name for name in self.server.store.list(prefix) if _is_shown(name)]
                body = json.dumps(names).encode()
                self._begin(HTTPStatus.OK, len(body), {"Content-Type": "application/json"})
                if with_body:
                    self.wfile.write(body)
                return None
            name = checked_name(unquote(target.path[1:], errors="strict"), "the log")
            size = self.server.store.size(name) if _is_shown(name) else None
            if size is None:
                return self._refuse(HTTPStatus.NOT_FOUND)
            self._file(name, size, with_body)
        except ValueError:
            self._refuse(HTTPStatus.NOT_FOUND)
        except OSError:  # the store's own trouble, which may pass
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        return None

    def _file(self, name: str, size: int, with_body: bool) -> None:
        start, stop, status, headers = 0, size, HTTPStatus.OK, {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and with_body:
            start = int(asked[1])
            stop = min(size, int(asked[2]) + 1) if asked[2] else size
            if start >= stop:
                headers["Content-Range"] = f"bytes */{size}"
                return self._begin(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, headers)
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if WRITTEN_ONCE.fullmatch(name):
            scope = "private" if self.server.token else "public"
            headers["Cache-Control"] = f"{scope}, max-age=31536000, immutable"
        self._begin(status, stop - start, headers)
        while with_body and start < stop:
            try:
                piece = self.server.store.get(name, start, min(stop, start + CHUNK_BYTES))
            except OSError:
                piece = b""
            if not piece:  # too late for a status; the reader sees a cut body
                self.close_connection = True
                return None
            self.wfile.write(piece)
            start += len(piece)
        return None

    def _begin(self, status: HTTPStatus, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        fixed = {"Content-Length": str(length), "Content-Type": "application/octet-stream"}
        for key, value in ({"Cache-Control": "no-cache"} | fixed | headers).items():
            self.send_header(key, value)
        self.end_headers()

    def _refuse(self, status: HTTPStatus) -> None:
        self._begin(status, 0, {"Cache-Control": "no-store"})


def _is_shown(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def serve(store: Store, host: str = "127.0.0.1", port: int = 0) -> LogServer:
    """Serves `store` on host:port (0: a free one), to those who know $GOSSAMER_LOG_TOKEN if set.

    Raises OSError when the port is taken.
    """
    return LogServer(store, host, port, os.environ.get(TOKEN_VARIABLE))
