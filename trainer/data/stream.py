"""The token stream: packed rows from several sources, each at its share of the rows.

The one idea: what comes next is a pure function of the seed and a few counters, and the counters
are the state. A source goes through its documents once an epoch, in a new order each time, packed
into rows; the next row comes from the source that is furthest behind its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Self

import numpy as np
import torch
from gossamer.trainer.batch import Document, TokenBatch, first_fit, pack, permutation
from gossamer.trainer.data.config import DataConfig
from gossamer.trainer.task import Problem, answer_ids, prompt_ids
from gossamer.trainer.tokenizer import BOS_ID, EOS_ID, Tokenizer
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents of one kind, none longer than a row."""

    name: str
    share: float
    """Of the rows; the shares of all sources sum to 1."""
    documents: list[Document]

    def fingerprint(self) -> str:
        """Hash of what would be learned: another text, tokenizer or cutting gives another."""
        digest = blake2b(digest_size=16)
        for document in self.documents:
            head = [len(document.token_ids), document.learn_from]
            digest.update(np.array([*head, *document.token_ids], dtype="<i4").tobytes())
        return digest.hexdigest()


def task_source(
    tokenizer: Tokenizer, problems: list[Problem], share: float, answer_only: bool
) -> Source:
    """One document a problem: prompt, answer, <eos>; with answer_only the prompt is only read."""
    documents = []
    for problem in problems:
        prompt, answer = prompt_ids(tokenizer, problem), answer_ids(tokenizer, problem)
        learn_from = len(prompt) if answer_only else 0
        documents.append(Document(token_ids=prompt + answer, learn_from=learn_from))
    return Source(name="task", share=share, documents=documents)


def corpus_source(tokenizer: Tokenizer, texts: Iterable[str], share: float, seq_len: int) -> Source:
    """Each text between <bos> and <eos>, cut into windows of seq_len tokens."""
    documents = []
    for text_ids in tokenizer.encode_all(list(texts)):
        token_ids = [BOS_ID, *text_ids, EOS_ID]
        windows = [token_ids[i : i + seq_len] for i in range(0, len(token_ids), seq_len)]
        documents += [Document(token_ids=window) for window in windows]
    return Source(name="corpus", share=share, documents=documents)


@dataclass(slots=True)
class _Counters:
    """How far a source is: rows drawn in all, and the next row of the current epoch."""

    drawn: int = 0
    epoch: int = 0
    row: int = 0


class TokenStream(IterableDataset):
    """Batches without end. `state_dict` is JSON; a stream that loads it goes on bit for bit."""

    def __init__(self, sources: list[Source], config: DataConfig, seed: int) -> None:
        """Raises ValueError for shares that do not sum to 1, and a source that has no documents."""
        self._sources = sources
        total = sum(source.share for source in self._sources)
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"data: the shares of the sources sum to {total}; expected 1")
        for source in self._sources:
            if not source.documents:
                raise ValueError(f"data: source {source.name!r} holds no documents")
        self._seed = seed
        self._num_rows, self._seq_len = config.num_rows, config.seq_len
        self._counters = [_Counters() for _ in self._sources]
        self._plans = [self._plan(number, epoch=0) for number in range(len(self._sources))]
        self._identity: dict[str, int | float | str] = {
            "seed": seed,
            "num_rows": self._num_rows,
            "seq_len": self._seq_len,
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
        """Where the stream is, and of what: JSON."""
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
        self._counters = [_Counters(**counters) for counters in state["counters"]]
        self._plans = [self._plan(n, c.epoch) for n, c in enumerate(self._counters)]

    def _next_row(self) -> list[Document]:
        done = 1 + sum(counters.drawn for counters in self._counters)
        behind = [
            source.share * done - counters.drawn
            for source, counters in zip(self._sources, self._counters, strict=True)
        ]
        number = behind.index(max(behind))
        counters = self._counters[number]
        if counters.row == len(self._plans[number]):
            counters.epoch, counters.row = counters.epoch + 1, 0
            self._plans[number] = self._plan(number, counters.epoch)
        items = self._plans[number][counters.row]
        counters.drawn, counters.row = counters.drawn + 1, counters.row + 1
        return [self._sources[number].documents[item] for item in items]

    def _plan(self, number: int, epoch: int) -> list[list[int]]:
        """The rows of one epoch of a source, as document numbers."""
        documents = self._sources[number].documents
        order = permutation(len(documents), self._sources[number].name, self._seed, epoch)
        lengths = [len(documents[item].token_ids) for item in order]
        return [[int(order[i]) for i in row] for row in first_fit(lengths, self._seq_len)]


def build_loader(sources: list[Source], config: DataConfig, seed: int) -> StatefulDataLoader:
    """The stream behind torchdata's loader; call iter() on it once, after load_state_dict.

    Draws nothing from torch's global random state. A state of other data is refused by iter().
    """
    return StatefulDataLoader(
        TokenStream(sources, config, seed),
        batch_size=None,
        num_workers=0,
        collate_fn=_unchanged,
        generator=torch.Generator().manual_seed(seed),
    )


def _unchanged(batch: TokenBatch) -> TokenBatch:
    return batch
