"""Where documents come from: a list in memory, or files that are read a stretch at a time.

The one idea: an epoch of a source is a chain of windows, each a pure function of the seed, the
epoch and the place it starts at. A window is read, shuffled and packed as a whole, so the place and
a row number are all that a resume needs. A list is one window; files are cut where a window holds
`buffer_tokens`.

Replicas deal blocks among themselves, or, where blocks are few, the records of every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
from gossamer.trainer.batch import Document, permutation
from gossamer.trainer.data.chat import chat_documents, checked_messages, render
from gossamer.trainer.data.config import DataConfig, SourceConfig
from gossamer.trainer.data.reader import Block, Reader, build_reader
from gossamer.trainer.tokenizer import Tokenizer

RECORDS_AT_A_TIME = 64
CHARS_AT_A_TIME = 1 << 20
FEWEST_BLOCKS = 8
"""Of a replica; with fewer, one would get much more than another."""

Place = tuple[int, int]
"""Position in the epoch's order of blocks, and a record's number in the block."""
START: Place = (0, 0)


@dataclass(frozen=True, slots=True)
class Window:
    """Documents in the order of learning, and where the next window starts; None: a new epoch."""

    documents: Sequence[Document]
    stop: Place | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Documents in memory, none longer than a row."""

    name: str
    share: float
    """Of the rows; the shares of all sources sum to 1."""
    documents: list[Document]
    replica: tuple[int, int] = (0, 1)
    """(index, number) of the replicas that share the documents."""

    def fingerprint(self) -> str:
        """Hash of what would be learned: another text, tokenizer or cutting gives another."""
        digest = blake2b(digest_size=16)
        for document in self.documents:
            head = [len(document.token_ids), document.learn_from]
            digest.update(np.array([*head, *document.token_ids], dtype="<i4").tobytes())
            if document.is_learned is not None:
                digest.update(bytes(document.is_learned))
        return digest.hexdigest()

    def window(self, seed: int, epoch: int, start: Place) -> Window:
        """The replica's share of all documents, in the epoch's order."""
        index, number = self.replica
        order = permutation(len(self.documents), self.name, seed, epoch)[index::number]
        return Window([self.documents[i] for i in order], None)


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Documents of files; at most about `buffer_tokens` of them are held."""

    name: str
    share: float
    """Of the rows; the shares of all sources sum to 1."""
    config: SourceConfig
    data: DataConfig
    tokenizer: Tokenizer
    heldout_permille: int = 0
    """Thousandths of the records that are not for training."""
    reads_heldout: bool = False
    """True gives those instead of the others."""

    @cached_property
    def _reader(self) -> Reader:
        return build_reader(self.config)

    @cached_property
    def _blocks(self) -> list[Block]:
        return self._reader.blocks()

    def fingerprint(self) -> str:
        """Hash of how the files are cut, how long they are, and of tokenizer and split."""
        digest = blake2b(self.tokenizer.fingerprint().encode(), digest_size=16)
        data = self.data
        told = (self.config.field, data.long_conversations, data.buffer_tokens)
        for part in (*self._blocks, *told, self.heldout_permille):
            digest.update(repr(part).encode())
        return digest.hexdigest()

    def window(self, seed: int, epoch: int, start: Place) -> Window:
        """Reads on from `start`; raises ValueError that names file and field."""
        order = permutation(len(self._blocks), "blocks", self.name, seed, epoch)
        documents: list[Document] = []
        num_tokens, stop = 0, None
        for records, place in self._batches(order, start):
            for document in self._documents(records):
                documents.append(document)
                num_tokens += len(document.token_ids)
            if num_tokens >= self.data.buffer_tokens:
                stop = place
                break
        shuffled = permutation(len(documents), self.name, seed, epoch, *start)
        return Window([documents[i] for i in shuffled], stop)

    def _batches(self, order: np.ndarray, start: Place) -> Iterator[tuple[list[Any], Place]]:
        """Contents of records from `start` on, a few at a time, and the place after them."""
        held: list[Any] = []
        num_chars, place = 0, start
        for place, content in self._contents(order, start):
            held.append(content)
            num_chars += len(content) if isinstance(content, str) else 0
            if len(held) == RECORDS_AT_A_TIME or num_chars >= CHARS_AT_A_TIME:
                yield held, place
                held, num_chars = [], 0
        if held:
            yield held, place

    def _contents(self, order: np.ndarray, start: Place) -> Iterator[tuple[Place, Any]]:
        """Of each record that is ours: the place after it, and what is to be learned."""
        index, replicas = self.data.replica_index, self.data.num_replicas
        deals_blocks = len(order) >= FEWEST_BLOCKS * replicas
        for position in range(start[0], len(order)):
            if deals_blocks and position % replicas != index:
                continue
            block = self._blocks[order[position]]
            skip = start[1] if position == start[0] else 0
            for number, record in enumerate(self._reader.read(block, skip), start=skip):
                if not deals_blocks and number % replicas != index:
                    continue
                content = self._content(record, block, number)
                if content:
                    yield (position, number + 1), content

    def _content(self, record: dict[str, Any], block: Block, number: int) -> Any:  # noqa: ANN401
        """The text, or the rendered conversation; None where it is empty or of the other split."""
        field = self.config.field
        try:
            if field not in record:
                raise ValueError(f"is missing; the record has {sorted(record)}")
            value = record[field]
            if is_heldout(value, self.heldout_permille) != self.reads_heldout:
                return None
            if self.config.messages_field is not None:
                return render(self.tokenizer, checked_messages(value), record.get("tools") or None)
            if not isinstance(value, str):
                raise ValueError(f"is a {type(value).__name__}; expected text")
            return value
        except ValueError as error:
            where = self._reader.where(block, number)
            raise ValueError(f"{where}: field {field!r} {error}") from error

    def _documents(self, contents: list[Any]) -> Iterator[Document]:
        data = self.data
        if self.config.messages_field is None:
            for token_ids in self.tokenizer.encode_all(contents):
                yield from text_documents(self.tokenizer, token_ids, data.seq_len)
        else:
            drops_long = data.long_conversations == "drop"
            yield from chat_documents(self.tokenizer, contents, data.seq_len, drops_long)


def text_documents(tokenizer: Tokenizer, text_ids: list[int], seq_len: int) -> Iterator[Document]:
    """A text between the tokens that begin and end a document, cut into windows of seq_len."""
    token_ids = np.array([*tokenizer.start_ids, *text_ids, tokenizer.eos_id], dtype=np.int32)
    for start in range(0, len(token_ids), seq_len):
        yield Document(token_ids=token_ids[start : start + seq_len])


def is_heldout(value: object, permille: int) -> bool:
    """Whether a record is not for training: by a hash of its text, or of its conversation."""
    digest = blake2b((value if isinstance(value, str) else repr(value)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") % 1000 < permille
