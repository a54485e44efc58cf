"""The text corpus: by default the standard library's own source, which every machine has.

The one idea: files come in the order of a hash of their relative name, so that the first
`max_chars` characters are a fair sample of the whole, and the same on every machine.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

TEXT_SUFFIXES = (".py", ".md", ".txt")
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_documents(path: str | None, max_chars: int) -> Iterator[str]:
    """Yields the corpus file by file, max_chars characters in all (the last file may be cut).

    path: a UTF-8 text file, or a folder whose *.py, *.md and *.txt are read; None is the *.py of
    the running interpreter's standard library, without tests. Raises ValueError for a path that
    does not exist, holds no text, or a file that is not UTF-8.
    """
    root = Path(path if path is not None else sysconfig.get_path("stdlib"))
    if not root.exists():
        raise ValueError(f"data.corpus_path: {root} does not exist; expected a text file or folder")
    documents = first_chars(_texts(root, is_library=path is None), max_chars)
    first = next(documents, None)
    if first is None:
        raise ValueError(f"data.corpus_path: {root} holds no text; expected *.py, *.md or *.txt")
    yield first
    yield from documents


def first_chars(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    """The first max_chars characters of the texts; the last text may be cut."""
    for text in texts:
        yield text[:max_chars]
        max_chars -= len(text)
        if max_chars <= 0:
            return


def _texts(root: Path, is_library: bool) -> Iterator[str]:
    for file in [root] if root.is_file() else _files(root, is_library):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if is_library:  # not ours to mend
                continue
            raise ValueError(
                f"data.corpus_path: {file} cannot be read; expected UTF-8 text ({error})"
            ) from error
        if text:
            yield text


def _files(root: Path, is_library: bool) -> list[Path]:
    names = []
    for folder, subfolders, files in os.walk(root):
        if is_library:
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        names += [
            Path(folder, name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py" if is_library else TEXT_SUFFIXES)
        ]
    return [root / name for name in sorted(names, key=lambda n: blake2b(n.encode()).digest())]
