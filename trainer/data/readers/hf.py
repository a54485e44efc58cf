"""Hugging Face data sets, by the `datasets` library.

The one idea: a data set is memory-mapped, so a thousand of its rows are a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from gossamer.trainer.data.config import SourceConfig
from gossamer.trainer.data.reader import Block

ROWS, ROWS_AT_A_TIME = 1000, 250


class HFReader:
    """A Reader of one split."""

    def __init__(self, config: SourceConfig) -> None:
        self._where = f"{config.path}, split {config.split}"
        held = _load(config)
        if not isinstance(held, datasets.Dataset):
            raise ValueError(
                f"data.sources: {config.path} is a {type(held).__name__}; expected a data set with"
                f" split {config.split!r}"
            )
        fields = [name for name in (config.field, "tools") if name in held.column_names]
        # a row without any column is none
        self._dataset = held.select_columns(fields or held.column_names).with_format(None)

    def blocks(self) -> list[Block]:
        size = len(self._dataset)
        return [Block("", i, min(i + ROWS, size)) for i in range(0, size, ROWS)]

    def read(self, block: Block, skip: int) -> Iterator[dict[str, Any]]:
        for start in range(block.start + skip, block.stop, ROWS_AT_A_TIME):
            columns = self._dataset[start : min(start + ROWS_AT_A_TIME, block.stop)]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def where(self, block: Block, number: int) -> str:
        return f"{self._where}, row {block.start + number}"


def _load(config: SourceConfig) -> Any:  # noqa: ANN401
    path = Path(config.path)
    on_disk = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if not on_disk:
            return datasets.load_dataset(config.path, split=config.split)
        held = datasets.load_from_disk(config.path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.sources: {config.path} cannot be loaded: {error}") from error
    return held.get(config.split) if isinstance(held, datasets.DatasetDict) else held
