"""JSON lines, plain or compressed by gzip or zstd.

The one idea: a plain file is cut every 16 MiB, and a line belongs to the block it begins in; a
compressed one can only be read from its beginning, so it is one block.
"""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard
from gossamer.trainer.data.config import SourceConfig
from gossamer.trainer.data.reader import Block, find_files

BLOCK_BYTES = 1 << 24
PLAIN, COMPRESSED = (".jsonl", ".ndjson"), (".gz", ".zst")
SUFFIXES = (*PLAIN, *(plain + compressed for plain in PLAIN for compressed in COMPRESSED))


class JsonlReader:
    """A Reader of files with one JSON object a line; blank lines are no records."""

    def __init__(self, config: SourceConfig) -> None:
        self._root, self._files = find_files(config.path, SUFFIXES)

    def blocks(self) -> list[Block]:
        found = []
        for name in self._files:
            size = (self._root / name).stat().st_size
            step = max(size, 1) if name.endswith(COMPRESSED) else BLOCK_BYTES
            found += [Block(name, i, min(i + step, size)) for i in range(0, size, step)]
        return found

    def read(self, block: Block, skip: int) -> Iterator[dict[str, Any]]:
        records = (line for line in self._lines(block) if line.strip())
        for number, line in enumerate(islice(records, skip, None), start=skip):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.where(block, number)} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{self.where(block, number)} is a {type(record).__name__}; expected an object"
                )
            yield record

    def where(self, block: Block, number: int) -> str:
        before = sum(1 for _ in self._lines(Block(block.file, 0, block.start)))
        lines = (i for i, line in enumerate(self._lines(block), start=1) if line.strip())
        return f"{self._root / block.file}, line {before + next(islice(lines, number, None))}"

    def _lines(self, block: Block) -> Iterator[bytes]:
        """The lines that begin in the block."""
        stop = math.inf if block.stop and block.file.endswith(COMPRESSED) else block.stop
        with _open(self._root / block.file) as file:
            place = block.start
            if place:
                file.seek(place - 1)
                place += len(file.readline()) - 1  # the rest of a line that began before
            while place < stop and (line := file.readline()):
                place += len(line)
                yield line


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.open(path, "rb"))
    return path.open("rb")
