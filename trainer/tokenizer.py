"""A byte-level BPE that the run trains for itself, each digit a token of its own.

The one idea: any text encodes without an unknown token, and no text can spell a special one, so a
special token is only ever where we put it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.corpus import first_chars
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")


class Tokenizer:
    """Text to token ids and back. `encode` adds no special token; `decode` drops them."""

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        self._bpe = bpe
        self._bpe.encode_special_tokens = True  # "<eos>" in a text is five characters of text

    @property
    def vocab_size(self) -> int:
        """Tokens in all, specials included."""
        return self._bpe.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; faster than one by one."""
        return [e.ids for e in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text without specials; bytes that are no UTF-8 become U+FFFD."""
        return self._bpe.decode(list(token_ids), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Writes one JSON file, whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(self._bpe.to_str())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def write_hf(self, folder: Path) -> None:
        """Writes the files from which transformers.AutoTokenizer loads this tokenizer."""
        from transformers import PreTrainedTokenizerFast

        pad, bos, eos = SPECIALS
        PreTrainedTokenizerFast(
            tokenizer_object=self._bpe, pad_token=pad, bos_token=bos, eos_token=eos
        ).save_pretrained(folder)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads what `save` wrote. Raises ValueError for anything else."""
    try:
        bpe = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: expected a tokenizer written by gossamer ({error})") from error
    if tuple(bpe.id_to_token(i) for i in range(len(SPECIALS))) != SPECIALS:
        raise ValueError(f"{path}: expected a tokenizer whose first tokens are {SPECIALS}")
    return Tokenizer(bpe)


def train_tokenizer(documents: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learns the merges from the first config.train_chars characters of the documents.

    The same documents give the same bytes. Raises ValueError when the text is too small for
    config.vocab_size tokens.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(first_chars(documents, config.train_chars), trainer)
    if bpe.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size is {config.vocab_size}, but the text has merges for only "
            f"{bpe.get_vocab_size()} tokens; expected more text or a smaller vocabulary"
        )
    return Tokenizer(bpe)


def token_fields(vocab_size: int) -> dict[str, int]:
    """Fields of a Hugging Face config that a tokenizer of ours decides."""
    return {
        "vocab_size": vocab_size,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
