"""A local directory as a store.

The one idea: bytes go to a temporary file beside the name and are fsynced; then a rename replaces,
or a hard link creates and fails where the name is taken. No reader ever sees half a file. Who opens
it to create it sweeps out what killed writers left.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.comm.store import checked_name

TEMPORARY = ".tmp-"
ABANDONED_S = 3600.0
"""A temporary file of this age is that of a writer that was killed."""


class LocalStore:
    """Files under one directory of a file system with hard links."""

    def __init__(self, url: str, create: bool = False) -> None:
        self.root = Path(url.removeprefix("file://")).absolute()
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        if not self.root.is_dir():
            raise FileNotFoundError(f"store {self.root} is not a directory")
        if create:
            self._sweep()

    def put(self, name: str, data: bytes, overwrite: bool = False) -> bool:
        """See Store.put."""
        path = self._path(name)
        if not overwrite and path.exists():
            return False
        with _written_beside(path, data) as temporary:
            try:
                (os.replace if overwrite else os.link)(temporary, path)
            except FileExistsError:
                return False
        _fsync_directory(path.parent)
        return True

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See Store.get."""
        try:
            with open(self._path(name), "rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(max(0, stop - start))
        except FileNotFoundError:
            raise FileNotFoundError(f"{name} is missing from store {self.root}") from None

    def list(self, prefix: str) -> list[str]:
        """See Store.list."""
        folder = self._path(prefix + "x").parent
        names = (
            path.relative_to(self.root).as_posix()
            for path in (folder.iterdir() if folder.is_dir() else ())
            if not path.name.startswith(TEMPORARY) and path.is_file()
        )
        return sorted(name for name in names if name.startswith(prefix))

    def size(self, name: str) -> int | None:
        """See Store.size."""
        path = self._path(name)
        return path.stat().st_size if path.is_file() else None

    def delete(self, name: str) -> None:
        """See Store.delete."""
        self._path(name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Deletes what killed writers left."""
        for temporary in self.root.rglob(f"{TEMPORARY}*"):
            try:
                if time.time() - temporary.stat().st_mtime > ABANDONED_S:
                    temporary.unlink()
            except FileNotFoundError:
                pass  # its writer was only slow

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name, str(self.root))


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file of `data`, fsynced, in the folder of `path`; gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        if error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _fsync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
