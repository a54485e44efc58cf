"""Reads what `gossamer log serve` serves, also through an ordinary HTTP cache; writes where it may.

The one idea: a body counts only with the length and the range that were asked for. What was cut
goes on at the byte where it stopped, and only where the server says that the file cannot change.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from urllib.parse import quote, urlsplit

from gossamer.comm.store import StoreError, checked_name
from gossamer.comm.store.patience import Unanswered, ask, patience_s, read_on

TOKEN_VARIABLE = "GOSSAMER_LOG_TOKEN"
"""A word that server and readers share; it is sent in clear, so use it over https."""

SILENCE_S = 30.0
PUT_TOKEN = "X-Gossamer-Put"
"""Of one put, so that a put whose answer was lost knows its own file when it is made again."""

CHUNK_BYTES = 1 << 18
TRANSIENT = {408, 425, 429}
NUMBER = r"([0-9]{1,18})"


class HttpStore:
    """The log at `url`; one connection a thread is kept open."""

    def __init__(self, url: str, create: bool = False) -> None:
        self.url = url.rstrip("/")
        self._place = urlsplit(self.url)
        if not self._place.hostname or self._place.query or self._place.fragment:
            raise ValueError(f"store {url!r} must be http(s)://host[:port][/path]")
        self._patience_s = patience_s()
        self._kept = threading.local()

    def put(self, name: str, data: bytes, overwrite: bool = False) -> bool:
        """See Store.put; StoreError where the server does not let write."""
        headers = {PUT_TOKEN: secrets.token_hex(16), "Content-Length": str(len(data))}
        if not overwrite:
            headers["If-None-Match"] = "*"
        return self._write("PUT", name, headers, data) != 412

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Store.get."""
        target = self._target(name)
        if stop is not None and stop <= start:  # no range header says this
            if self.size(name) is None:
                raise FileNotFoundError(f"{name} is missing from store {self.url}")
            return b""
        return self._whole(name, target, start, stop)

    def list(self, prefix: str) -> list[str]:
        """See Store.list."""
        checked_name(prefix + "x", self.url)
        target = f"{self._place.path}/?list={quote(prefix, safe='')}"
        body = self._whole(f"the list of {prefix!r}", target, 0, None)
        try:
            names = json.loads(body)
            if not isinstance(names, list) or not all(each.startswith(prefix) for each in names):
                raise ValueError(f"expected a list of names that begin with {prefix!r}")
        except (ValueError, AttributeError, RecursionError) as error:
            raise StoreError(f"store {self.url} lists no names: {error}") from error
        return sorted(names)

    def size(self, name: str) -> int | None:
        """See Store.size."""
        target = self._target(name)

        def attempt() -> int:
            with self._answer("HEAD", target, {}, name) as answer:
                return self._length(answer, name)

        try:
            return ask(f"store {self.url}: size {name}", self._patience_s, attempt)
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        """See Store.delete; StoreError where the server does not let write."""
        self._write("DELETE", name, {}, b"")

    def _write(self, method: str, name: str, headers: dict[str, str], data: bytes) -> int:
        target = self._target(name)

        def attempt() -> int:
            with self._answer(method, target, headers, name, data) as answer:
                self._length(answer, name)
                return answer.status

        return ask(f"store {self.url}: {method.lower()} {name}", self._patience_s, attempt)

    def _target(self, name: str) -> str:
        return f"{self._place.path}/{quote(checked_name(name, self.url))}"

    def _whole(self, name: str, target: str, start: int, stop: int | None) -> bytes:
        sizes: set[int] = set()  # of the file, as each answer tells it

        def body_from(done: int) -> Iterator[bytes]:
            if not done:
                sizes.clear()
            begin, headers = start + done, {}
            if begin or stop is not None:
                headers["Range"] = f"bytes={begin}-{'' if stop is None else stop - 1}"
            with self._answer("GET", target, headers, name) as answer:
                if answer.status == 416 and not done and self._ends_before(answer, begin):
                    return
                size, skip, left = self._window(answer, name, begin, stop)
                sizes.add(size)
                if len(sizes) > 1:
                    raise StoreError(f"store {self.url} changed {name} while it was read")
                while left:
                    piece = answer.read1(min(CHUNK_BYTES, skip or left))
                    if not piece:
                        raise IncompleteRead(b"", skip + left)
                    if skip:
                        skip -= len(piece)
                    else:
                        left -= len(piece)
                        yield piece

        return read_on(f"store {self.url}: get {name}", self._patience_s, body_from)

    def _window(
        self, answer: HTTPResponse, name: str, begin: int, stop: int | None
    ) -> tuple[int, int, int]:
        """Size of the file; bytes of the body to skip, then to take. Raises StoreError."""
        length = self._length(answer, name)
        if answer.status == 200:  # the whole file; it need not heed a Range
            end = length if stop is None else min(stop, length)
            return length, begin if begin < end else 0, max(0, end - begin)
        said = answer.getheader("Content-Range", "")
        match = re.fullmatch(rf"bytes {NUMBER}-{NUMBER}/{NUMBER}", said)
        first, last, size = map(int, match.groups()) if match else (-1, -1, -1)
        end = size if stop is None else min(stop, size)
        if (first, last + 1, length) != (begin, end, end - begin):
            raise StoreError(
                f"store {self.url} answers {said!r} and {length} bytes for bytes {begin} to "
                f"{'the end' if stop is None else stop} of {name}"
            )
        return size, 0, length

    @staticmethod
    def _ends_before(answer: HTTPResponse, begin: int) -> bool:
        said = re.fullmatch(rf"bytes \*/{NUMBER}", answer.getheader("Content-Range", ""))
        return said is not None and int(said[1]) <= begin

    def _length(self, answer: HTTPResponse, name: str) -> int:
        length = answer.getheader("Content-Length", "")
        is_told = re.fullmatch(NUMBER, length) and not answer.chunked
        if not is_told or answer.getheader("Content-Encoding"):
            raise StoreError(f"store {self.url} must say how many bytes {name} has, uncoded")
        return int(length)

    @contextmanager
    def _answer(
        self, method: str, target: str, headers: dict[str, str], name: str, data: bytes = b""
    ) -> Iterator[HTTPResponse]:
        """A response of status 200; to a Range also 206 and 416, to an If-None-Match also 412.

        Raises Unanswered and others.
        """
        connection, answer, may_change = self._connection(), None, False
        also = (206, 416) if "Range" in headers else (412,) if "If-None-Match" in headers else ()
        try:
            try:
                # in pieces: a socket's timeout is for one of them
                body = io.BytesIO(data) if data else None
                connection.request(method, target, body=body, headers=headers | _authorization())
            except BrokenPipeError:
                pass  # refused before it was sent whole: the answer says why
            answer = connection.getresponse()
            if answer.status not in (200, *also):
                raise self._refusal(answer, name)
            may_change = "immutable" not in answer.getheader("Cache-Control", "")
            yield answer
        except (StoreError, FileNotFoundError):
            raise
        except (OSError, HTTPException) as error:
            connection.close()
            said = f"{type(error).__name__} {error}".rstrip()
            raise Unanswered(said, from_start=may_change) from error
        finally:
            if answer is None or answer.chunked or answer.read(0) or not answer.isclosed():
                connection.close()  # what is left of a body must not meet the next question

    def _refusal(self, answer: HTTPResponse, name: str) -> Exception:
        if answer.status == 404:
            return FileNotFoundError(f"{name} is missing from store {self.url}")
        if answer.status in (405, 501):
            return StoreError(f"store {self.url} is read only: {name} must be put where it lies")
        said = f"{answer.status} {answer.reason}"
        if answer.status in TRANSIENT or answer.status >= 500:
            return Unanswered(said)
        if answer.status in (401, 403):
            said += f"; {TOKEN_VARIABLE} must hold the server's"
        return StoreError(f"store {self.url} refuses {name}: {said}")

    def _connection(self) -> HTTPConnection:
        kept: HTTPConnection | None = getattr(self._kept, "connection", None)
        if kept is None:
            kind = HTTPSConnection if self._place.scheme == "https" else HTTPConnection
            host = self._place.netloc.rpartition("@")[2]
            kept = kind(host, timeout=SILENCE_S, blocksize=CHUNK_BYTES)
            self._kept.connection = kept
        # bytes that nobody asked for, or the other side's goodbye
        elif kept.sock:
            poll = select.poll()
            poll.register(kept.sock, select.POLLIN)
            if poll.poll(0):
                kept.close()
        return kept


def _authorization() -> dict[str, str]:
    token = os.environ.get(TOKEN_VARIABLE)
    return {"Authorization": f"Bearer {token}"} if token else {}
