"""The seam Reader: files of one format as blocks of records.

The one idea: a source is a list of blocks that can be read in any order, each a stretch of one
file; so an order of blocks is a shuffle, and a block and a record number are a place to go on from.
No torch here.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gossamer.trainer.data.config import SourceConfig
from gossamer.trainer.import_path import resolve


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of a file, in the format's own units; [start, stop)."""

    file: str
    """Relative to where the source lies, so that a source may be moved."""
    start: int
    stop: int


class Reader(Protocol):
    """Built as `Reader(config: SourceConfig)`; raises ValueError for files that cannot be right."""

    def blocks(self) -> list[Block]:
        """All there is to read; the same list for the same files, wherever they lie."""
        ...

    def read(self, block: Block, skip: int) -> Iterator[dict[str, Any]]:
        """The block's records in order, without the first `skip`; not all in memory at once.

        A record holds at least the fields that the config names, if the file does. Raises
        ValueError that names file and place.
        """
        ...

    def where(self, block: Block, number: int) -> str:
        """Where a person finds record `number` of the block; may be slow."""
        ...


READERS = {
    "parquet": "gossamer.trainer.data.readers.parquet:ParquetReader",
    "jsonl": "gossamer.trainer.data.readers.jsonl:JsonlReader",
    "text": "gossamer.trainer.data.readers.text:TextReader",
    "hf": "gossamer.trainer.data.readers.hf:HFReader",
}


def build_reader(config: SourceConfig) -> Reader:
    """Raises ValueError for a kind that is not known, and for files that cannot be read."""
    return resolve(config.kind, READERS, "data.sources.kind")(config)


def find_files(path: str, suffixes: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The files of a source: the folder they lie in, and their names there, sorted.

    path: a file, a folder that is searched for `suffixes`, or a pattern. Raises ValueError when
    there is none.
    """
    root = Path(path)
    if glob.has_magic(path):
        root = Path(*root.parts[: next(i for i, p in enumerate(root.parts) if glob.has_magic(p))])
        found = [Path(name) for name in glob.glob(path, recursive=True)]
    elif root.is_dir():
        found = [file for file in root.rglob("*") if file.name.endswith(suffixes)]
    else:
        root, found = root.parent, [root]
    names = sorted(file.relative_to(root).as_posix() for file in found if file.is_file())
    if not names:
        raise ValueError(
            f"data.sources: {path} is not there or holds no file; expected a file, a pattern, or a"
            f" folder with {', '.join(f'*{suffix}' for suffix in suffixes)}"
        )
    return root, names


def source_texts(config: SourceConfig) -> Iterator[str]:
    """The texts of a source, or what is said in its conversations, in the order of its files."""
    reader = build_reader(config)
    for block in reader.blocks():
        for record in reader.read(block, 0):
            value = record.get(config.field)
            said = value if isinstance(value, list) else [{"content": value}]
            contents = [part.get("content") for part in said if isinstance(part, dict)]
            yield from (text for text in contents if isinstance(text, str))
