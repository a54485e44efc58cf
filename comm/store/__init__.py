"""Stores: where a log's files lie. Names are relative, with `/` between folders."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

STORES = {"file": "gossamer.comm.store.local:LocalStore"}


class Store(Protocol):
    """Files that appear whole or not at all; made as `cls(url, create)`."""

    def put(self, name: str, data: bytes, overwrite: bool = False) -> bool:
        """Writes a file; False, and nothing written, where it exists and `overwrite` is False."""
        ...

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file (to its end). Raises FileNotFoundError naming it."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Sorted names of the files in the prefix's folder (`a/` of `a/b`) that begin with it."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file, None until it is whole."""
        ...

    def delete(self, name: str) -> None:
        """Removes a file; one that is not there is no error."""
        ...


def open_store(url: str | Path, create: bool = False) -> Store:
    """The store at `url`, `scheme://place` or a local path.

    Raises ValueError for a scheme that STORES lacks, FileNotFoundError when the place does not
    exist and `create` is False.
    """
    scheme, mark, _ = str(url).partition("://")
    scheme = scheme if mark else "file"
    if scheme not in STORES:
        raise ValueError(f"store {url!r}: scheme {scheme!r} is not one of {', '.join(STORES)}")
    module, attribute = STORES[scheme].split(":")
    return getattr(import_module(module), attribute)(str(url), create)
