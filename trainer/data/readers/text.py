"""Text files, each one document.

The one idea: a file is a block of one record.
"""

from __future__ import annotations

from collections.abc import Iterator

from gossamer.trainer.corpus import TEXT_SUFFIXES
from gossamer.trainer.data.config import SourceConfig
from gossamer.trainer.data.reader import Block, find_files


class TextReader:
    """A Reader of UTF-8 files."""

    def __init__(self, config: SourceConfig) -> None:
        self._field = config.text_field
        self._root, self._files = find_files(config.path, TEXT_SUFFIXES)

    def blocks(self) -> list[Block]:
        return [Block(name, 0, (self._root / name).stat().st_size) for name in self._files]

    def read(self, block: Block, skip: int) -> Iterator[dict[str, str]]:
        if skip:
            return
        try:
            yield {self._field: (self._root / block.file).read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            where = self.where(block, 0)
            raise ValueError(f"{where} is not UTF-8 text ({error})") from error

    def where(self, block: Block, number: int) -> str:
        return str(self._root / block.file)
