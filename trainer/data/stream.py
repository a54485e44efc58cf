"""The token stream: packed rows from several sources, each at its share of the rows.

The one idea: what comes next is a pure function of the seed and a few counters, and the counters
are the state. A source goes through its documents once an epoch, in a new order each time, packed
into rows; the next row comes from the source that is furthest behind its share. Ranks do not enter:
they split a batch that is the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Self

import torch
from gossamer.trainer.batch import Document, TokenBatch, first_fit, pack
from gossamer.trainer.data.config import DataConfig
from gossamer.trainer.data.source import START, FileSource, Place, Source, Window
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader


@dataclass(slots=True)
class _Counters:
    """How far a source is: rows drawn in all, and the next row of the current window."""

    drawn: int = 0
    epoch: int = 0
    row: int = 0
    start: Place = START
    """Where the window starts in its epoch."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """A window as rows of document numbers."""

    window: Window
    rows: list[list[int]]


class TokenStream(IterableDataset):
    """Batches without end. `state_dict` is JSON; a stream that loads it goes on bit for bit."""

    def __init__(
        self,
        sources: Sequence[Source | FileSource],
        config: DataConfig,
        seed: int,
        reads_ahead: bool = False,
    ) -> None:
        """reads_ahead: a thread prepares each source's next window while one is learned.

        Raises ValueError for shares that do not sum to 1; of sources that cannot be read or hold
        no documents it is raised when they are come to.
        """
        self._sources = sources
        total = sum(source.share for source in self._sources)
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"data: the shares of the sources sum to {total}; expected 1")
        self._seed = seed
        self._num_rows, self._seq_len = config.num_rows, config.seq_len
        self._counters = [_Counters() for _ in self._sources]
        self._packed: list[_Packed | None] = [None for _ in self._sources]
        self._thread = ThreadPoolExecutor(1, "gossamer-data") if reads_ahead else None
        self._ahead: dict[tuple[int, int, Place], Future[_Packed]] = {}
        self._identity: dict[str, int | float | str] = {
            "seed": seed,
            "num_rows": self._num_rows,
            "seq_len": self._seq_len,
            "replica_index": config.replica_index,
            "num_replicas": config.num_replicas,
        }
        for source in self._sources:
            self._identity[f"share of {source.name}"] = source.share
            self._identity[f"fingerprint of {source.name}"] = source.fingerprint()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenBatch:
        documents: list[Document] = []
        rows = []
        for _ in range(self._num_rows):
            start = len(documents)
            documents += self._next_row()
            rows.append(range(start, len(documents)))
        return pack(documents, rows, self._seq_len)[0]

    def state_dict(self) -> dict:
        """Where the stream is, and of what: JSON, a few hundred bytes a source."""
        counters = [asdict(counters) for counters in self._counters]
        return {"identity": self._identity, "counters": counters}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` was taken.

        Raises ValueError when the state is of another seed, shape, mixture or text.
        """
        saved = state["identity"]
        for key in sorted(saved.keys() | self._identity.keys()):
            if saved.get(key) != self._identity.get(key):
                raise ValueError(
                    f"data: {key} is {self._identity.get(key)}, but the state to resume from has "
                    f"{saved.get(key)}; expected the same corpus, task, tokenizer and data config"
                )
        self._counters = [
            _Counters(**{**counters, "start": tuple(counters["start"])})
            for counters in state["counters"]
        ]
        self._packed = [None for _ in self._sources]

    def _next_row(self) -> list[Document]:
        done = 1 + sum(counters.drawn for counters in self._counters)
        behind = [
            source.share * done - counters.drawn
            for source, counters in zip(self._sources, self._counters, strict=True)
        ]
        number = behind.index(max(behind))
        packed, counters = self._window_at(number), self._counters[number]
        items = packed.rows[counters.row]
        counters.drawn, counters.row = counters.drawn + 1, counters.row + 1
        return [packed.window.documents[item] for item in items]

    def _window_at(self, number: int) -> _Packed:
        """The window that holds the source's next row."""
        counters = self._counters[number]
        packed = self._packed[number] or self._load(number)
        # the last window of an epoch may be empty, and then the next one's first is not
        for _ in range(2):
            if counters.row < len(packed.rows):
                return packed
            counters.epoch, counters.start = _after(counters, packed.window)
            counters.row = 0
            packed = self._load(number)
        if not packed.rows:
            raise ValueError(f"data: source {self._sources[number].name!r} holds no documents")
        return packed

    def _load(self, number: int) -> _Packed:
        counters = self._counters[number]
        here = (number, counters.epoch, counters.start)
        if self._thread is None:
            packed = self._read(*here)
        else:
            packed = (
                self._ahead.pop(here, None) or self._thread.submit(self._read, *here)
            ).result()
            following = (number, *_after(counters, packed.window))
            self._ahead[following] = self._thread.submit(self._read, *following)
        self._packed[number] = packed
        return packed

    def _read(self, number: int, epoch: int, start: Place) -> _Packed:
        window = self._sources[number].window(self._seed, epoch, start)
        lengths = [len(document.token_ids) for document in window.documents]
        return _Packed(window, first_fit(lengths, self._seq_len))


def _after(counters: _Counters, window: Window) -> tuple[int, Place]:
    """Epoch and place of the window after this one."""
    if window.stop is None:
        return counters.epoch + 1, START
    return counters.epoch, window.stop


def build_loader(
    sources: Sequence[Source | FileSource], config: DataConfig, seed: int
) -> StatefulDataLoader:
    """The stream behind torchdata's loader; call iter() on it once, after load_state_dict.

    Draws nothing from torch's global random state. A state of other data is refused by iter().
    """
    return StatefulDataLoader(
        TokenStream(sources, config, seed, reads_ahead=True),
        batch_size=None,
        num_workers=0,
        collate_fn=_unchanged,
        generator=torch.Generator().manual_seed(seed),
    )


def _unchanged(batch: TokenBatch) -> TokenBatch:
    return batch
