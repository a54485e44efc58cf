"""Stores: where a log's files lie. Names are relative, with `/` between folders."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

STORES = {
    "file": "gossamer.comm.store.local:LocalStore",
    "s3": "gossamer.comm.store.objects:ObjectStore",
    "gs": "gossamer.comm.store.objects:ObjectStore",
    "az": "gossamer.comm.store.objects:ObjectStore",
    "http": "gossamer.comm.store.http:HttpStore",
    "https": "gossamer.comm.store.http:HttpStore",
    "ray": "gossamer.comm.store.ray:RayStore",
}


class StoreError(OSError):
    """A store that does not answer, refuses, or answers what cannot be."""


class Store(Protocol):
    """Files that appear whole or not at all; made as `cls(url, create)`.

    Every method raises StoreError where the store fails it, ValueError for a name with `..`.
    """

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

    Raises ValueError for a scheme that STORES lacks, FileNotFoundError when a place that can be
    made does not exist and `create` is False.
    """
    scheme, mark, _ = str(url).partition("://")
    scheme = scheme if mark else "file"
    if scheme not in STORES:
        raise ValueError(f"store {url!r}: scheme {scheme!r} is not one of {', '.join(STORES)}")
    module, attribute = STORES[scheme].split(":")
    return getattr(import_module(module), attribute)(str(url), create)


def checked_name(name: str, place: str) -> str:
    """`name`. Raises ValueError where it is not the name of a file inside `place`."""
    folders = name.split("/")
    if {"", ".", ".."} & set(folders) or "\\" in name or not name.isprintable():
        raise ValueError(f"name {name!r} leaves store {place}")
    return name
