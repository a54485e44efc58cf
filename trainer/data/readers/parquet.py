"""Parquet files.

The one idea: a row group is a block, of which the columns that are needed are read a few hundred
rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from gossamer.trainer.data.config import SourceConfig
from gossamer.trainer.data.reader import Block, find_files

ROWS_AT_A_TIME = 256


class ParquetReader:
    """A Reader of row groups."""

    def __init__(self, config: SourceConfig) -> None:
        self._root, self._files = find_files(config.path, (".parquet",))
        self._fields = (config.field, "tools")

    def blocks(self) -> list[Block]:
        return [
            Block(name, group, group + 1)
            for name in self._files
            for group in range(self._open(name).metadata.num_row_groups)
        ]

    def read(self, block: Block, skip: int) -> Iterator[dict[str, Any]]:
        file = self._open(block.file)
        columns = [name for name in self._fields if name in file.schema_arrow.names]
        batches = file.iter_batches(ROWS_AT_A_TIME, row_groups=[block.start], columns=columns)
        try:
            for batch in batches:
                yield from batch[skip:].to_pylist()
                skip = max(skip - len(batch), 0)
        except (OSError, pyarrow.ArrowException) as error:
            where = f"{self._root / block.file}, row group {block.start}"
            raise ValueError(f"{where} cannot be read: {error}") from error

    def where(self, block: Block, number: int) -> str:
        return f"{self._root / block.file}, row group {block.start}, row {number}"

    def _open(self, name: str) -> pyarrow.parquet.ParquetFile:
        try:
            return pyarrow.parquet.ParquetFile(self._root / name)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self._root / name} is not a Parquet file: {error}") from error
