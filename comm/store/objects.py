"""A bucket as a store: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.

The one idea: creation is a conditional put. Each put carries a token of its own, so that a put
whose answer was lost knows itself again when the next attempt finds the name taken.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import obstore
from gossamer.comm.store import StoreError, checked_name
from gossamer.comm.store.patience import Unanswered, ask, patience_s, read_on
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

T = TypeVar("T")

TOKEN = "gossamerput"  # Azure takes no dash
SILENCE_S = 30.0
SLOWEST_PUT_BYTES_PER_S = 125_000
CHUNK_BYTES = 1 << 20

ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
"""obstore reads these too, but not where it is given timeouts."""

# no answer at all, or one that says: too slow, two at once, too many, not now
TRANSIENT = re.compile(r"^(?!.*status code)|status code: (408|409|429|5\d\d)")

# a range that begins at the file's end: S3 refuses, Azure answers and object_store objects
BEYOND_END = re.compile("status code: 416|Wanted range starting at")


class ObjectStore:
    """The objects under one prefix of a bucket; a put is one request, so 5 GiB at most on S3."""

    def __init__(self, url: str, create: bool = False) -> None:
        self.url = url.rstrip("/")
        self._patience_s = patience_s()
        self._writers: dict[float, obstore.store.ObjectStore] = {}
        try:
            self._reader = _client(self.url, read_s=SILENCE_S, request_s=1e6)
        except BaseError as error:
            raise StoreError(f"store {url}: {_sentence(error)}") from error

    def put(self, name: str, data: bytes, overwrite: bool = False) -> bool:
        """See Store.put."""
        checked_name(name, self.url)
        token = secrets.token_hex(16)
        limit_s = _put_s(len(data))
        if limit_s not in self._writers:
            # without a limit on each read: that would count the upload's own time
            self._writers[limit_s] = _client(self.url, read_s=None, request_s=limit_s)

        def attempt() -> bool:
            try:
                obstore.put(
                    self._writers[limit_s],
                    name,
                    data,
                    mode="overwrite" if overwrite else "create",
                    attributes={TOKEN: token},
                    use_multipart=False,
                )
            except AlreadyExistsError:
                found = obstore.get(self._reader, name, options={"head": True})
                return found.attributes.get(TOKEN) == token
            return True

        try:
            return self._ask(f"put {name}", attempt)
        except FileNotFoundError as error:
            raise StoreError(f"store {self.url}: there is no such bucket") from error

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Store.get."""
        checked_name(name, self.url)
        if stop is not None and stop <= start:  # no range header says this
            if self.size(name) is None:
                raise FileNotFoundError(f"{name} is missing from store {self.url}")
            return b""
        e_tags: list[str | None] = []

        def body_from(done: int) -> Iterator[bytes]:
            if not done:
                e_tags.clear()
            try:
                yield from self._body(name, start + done, stop, e_tags)
            except (BaseError, FileNotFoundError) as error:
                if not done and BEYOND_END.search(str(error)):
                    return
                raise _told(error, name, self.url) from error

        return read_on(f"store {self.url}: get {name}", self._patience_s, body_from)

    def _body(
        self, name: str, start: int, stop: int | None, e_tags: list[str | None]
    ) -> Iterator[bytes]:
        options: obstore.GetOptions = {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        if e_tags and e_tags[-1]:
            options["if_match"] = e_tags[-1]
        found = obstore.get(self._reader, name, options=options)
        e_tags.append(found.meta["e_tag"])
        left = found.range[1] - found.range[0]
        for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
            left -= len(chunk)
            yield bytes(chunk)
        if left:
            raise Unanswered(f"{name} came with {left} bytes fewer than promised")

    def list(self, prefix: str) -> list[str]:
        """See Store.list."""
        checked_name(prefix + "x", self.url)
        folder = prefix.rpartition("/")[0] or None
        listed = self._ask(
            f"list {prefix!r}", lambda: obstore.list_with_delimiter(self._reader, folder)
        )
        return sorted(each["path"] for each in listed["objects"] if each["path"].startswith(prefix))

    def size(self, name: str) -> int | None:
        """See Store.size."""
        checked_name(name, self.url)
        try:
            return self._ask(f"size {name}", lambda: obstore.head(self._reader, name))["size"]
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        """See Store.delete."""
        checked_name(name, self.url)
        try:
            self._ask(f"delete {name}", lambda: obstore.delete(self._reader, name))
        except FileNotFoundError:
            pass

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return call()
            except BaseError as error:
                raise _told(error, what, self.url) from error

        return ask(f"store {self.url}: {what}", self._patience_s, attempt)


def _client(url: str, read_s: float | None, request_s: float) -> obstore.store.ObjectStore:
    """obstore's client; `read_s` bounds each wait for bytes, `request_s` a whole request."""
    options: obstore.store.ClientConfig = {
        "connect_timeout": timedelta(seconds=10),
        "timeout": timedelta(seconds=request_s),
        "allow_http": any(os.environ.get(name, "").lower() in ("1", "true") for name in ALLOW_HTTP),
    }
    if read_s:
        options["read_timeout"] = timedelta(seconds=read_s)
    return obstore.store.from_url(url, client_options=options, retry_config={"max_retries": 0})


def _put_s(nbytes: int) -> float:
    """Seconds for a put on the slowest link, in powers of two: few clients serve all sizes."""
    return SILENCE_S * 2 ** int(nbytes / (SILENCE_S * SLOWEST_PUT_BYTES_PER_S)).bit_length()


def _told(error: Exception, what: str, url: str) -> Exception:
    """What obstore's error means here."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{what} is missing from store {url}")
    text = _sentence(error)
    if isinstance(error, PreconditionError):
        return Unanswered(text, from_start=True)
    if "builder error" in text:
        text = "AWS_ALLOW_HTTP=true (or AZURE_, GOOGLE_) must be set for an endpoint without TLS"
    elif isinstance(error, GenericError) and TRANSIENT.search(text):
        return Unanswered(text)
    return StoreError(f"store {url}: {what}: {text}")


def _sentence(error: Exception) -> str:
    """The first line of an obstore error, and what the server said in its XML."""
    text = str(error)
    said = re.search(r"<Message>(.*?)(</Message>|\n)", text)
    line = text.partition("\n")[0].partition("<?xml")[0] + (said[1] if said else "")
    return re.sub(r".*Error performing (\w+ \S+) in \S+ - ", r"\1: ", line)
