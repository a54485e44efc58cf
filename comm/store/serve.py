"""Serves any store over HTTP: what `gossamer log serve` runs and HttpStore asks.

The one idea: every file but a hint is written once, so it may be cached for ever by whoever stands
in between, and a range of it is the same bytes today and tomorrow.

    GET, HEAD /NAME        a file, or a range of it
    GET /?list=PREFIX      names as a JSON list; /FOLDER/?list=PREFIX names inside it
    PUT, DELETE /NAME      where it is writable; `If-None-Match: *` creates, or answers 412
"""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gossamer.comm.store import Store, checked_name
from gossamer.comm.store.http import PUT_TOKEN, TOKEN_VARIABLE

WRITTEN_ONCE = re.compile(
    r"(.+/)?((manifest|epoch|fold)-[\d-]+\.json|parts/[^/]+|(rounds|anchors)/\d+/[^/]+)"
)
"""Files that never change, or that readers know by their hash. log.json is not one: a new run may
take the place of an old one."""

CHUNK_BYTES = 8 << 20
REMEMBERED_PUTS = 10_000
SILENCE_S = 60.0


class LogServer(ThreadingHTTPServer):
    """A server that answers in threads of its own until `close`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, store: Store, host: str, port: int, token: str | None, writable: bool = False
    ) -> None:
        super().__init__((host, port), _WritingHandler if writable else _Handler)
        self.store = store
        self.token = token
        self._turn = threading.Lock()
        self._created: dict[str, str] = {}
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

    def create(self, name: str, data: bytes, token: str) -> bool:
        """Puts a new file; True also for the same put, told by its token, once more."""
        with self._turn:
            if not self.store.put(name, data):
                return bool(token) and self._created.get(name) == token
            self._created[name] = token
            if len(self._created) > REMEMBERED_PUTS:
                del self._created[next(iter(self._created))]
            return True

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

    def _is_known(self) -> bool:
        token, said = self.server.token, self.headers.get("Authorization", "")
        return not token or hmac.compare_digest(said.encode(), f"Bearer {token}".encode())

    def _reply(self, with_body: bool) -> None:
        if not self._is_known():
            return self._refuse(HTTPStatus.UNAUTHORIZED)
        target = urlsplit(self.path)
        try:
            asked = parse_qs(target.query, keep_blank_values=True).get("list")
            if target.path == "/" or (asked and target.path.endswith("/")):
                folder = unquote(target.path[1:], errors="strict")
                prefix = asked[0] if asked else ""
                found = filter(_is_shown, self.server.store.list(folder + prefix))
                body = json.dumps([name.removeprefix(folder) for name in found]).encode()
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
        whole = None
        if with_body and not WRITTEN_ONCE.fullmatch(name):
            # it may be replaced while it is sent: read at once, or it would be a mix of both
            whole = self.server.store.get(name)
            size = len(whole)
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
            end = min(stop, start + CHUNK_BYTES)
            try:
                piece = whole[start:end] if whole else self.server.store.get(name, start, end)
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


class _WritingHandler(_Handler):
    def do_PUT(self) -> None:  # noqa: N802, http.server calls it
        length = self.headers.get("Content-Length", "")
        if not self._is_known() or not re.fullmatch("[0-9]{1,18}", length):
            self.close_connection = True  # what comes is no question
            known = HTTPStatus.LENGTH_REQUIRED if self._is_known() else HTTPStatus.UNAUTHORIZED
            return self._refuse(known)
        data = self.rfile.read(int(length))
        if len(data) < int(length):  # the sender is gone
            self.close_connection = True
            return None
        self._change(lambda name: self._put(name, data))
        return None

    def do_DELETE(self) -> None:  # noqa: N802, http.server calls it
        if not self._is_known():
            return self._refuse(HTTPStatus.UNAUTHORIZED)
        self._change(self.server.store.delete)
        return None

    def _put(self, name: str, data: bytes) -> bool:
        if self.headers.get("If-None-Match") == "*":
            return self.server.create(name, data, self.headers.get(PUT_TOKEN, ""))
        return self.server.store.put(name, data, overwrite=True)

    def _change(self, change: Callable[[str], bool | None]) -> None:
        try:
            name = checked_name(unquote(urlsplit(self.path).path[1:], errors="strict"), "the log")
            if not _is_shown(name):
                raise ValueError(f"{name} is hidden")
            is_taken = change(name) is False
        except ValueError:
            return self._refuse(HTTPStatus.NOT_FOUND)
        except OSError:  # the store's own trouble, which may pass
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        return self._refuse(HTTPStatus.PRECONDITION_FAILED if is_taken else HTTPStatus.OK)


def _is_shown(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def serve(
    store: Store, host: str = "127.0.0.1", port: int = 0, writable: bool = False
) -> LogServer:
    """Serves `store` on host:port (0: a free one), to those who know $GOSSAMER_LOG_TOKEN if set.

    Raises OSError when the port is taken.
    """
    return LogServer(store, host, port, os.environ.get(TOKEN_VARIABLE), writable)
