"""Text to token ids and back: a byte-level BPE that the run trains for itself, or a foreign one.

The one idea: no text can spell a special token, so a special token is only ever where we, or a
chat template, put it. Our own BPE makes each digit a token, and encodes any text without an unknown
token; of a Hugging Face folder, tokenizer.json is taken as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tokenizers
from gossamer.trainer.corpus import first_chars
from gossamer.trainer.data.config import TokenizerConfig
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
PLAIN_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}\
{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}\
{% else %}{{ message.content }}{% endif %}{% endfor %}"""
"""How our own tokenizer writes a conversation: a question and its answer as a task does."""
SETTINGS_FILES = ("special_tokens_map.json", "tokenizer_config.json")
"""Where a folder names its special tokens; what a later file says goes."""


class Tokenizer:
    """Text to token ids and back. `encode` adds no special token; `decode` drops them."""

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        settings: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """settings: what a foreign folder says of its tokens, of which eos_token is one; None is
        our own. chat_template: Jinja, as Hugging Face has it."""
        bpe.no_truncation()
        bpe.no_padding()
        self._bpe = bpe
        self._spelled = tokenizers.Tokenizer.from_str(bpe.to_str())
        self._bpe.encode_special_tokens = True  # "<eos>" in a text is five characters of text
        self._settings, self.chat_template = settings, chat_template
        self.added_tokens = tuple(t.content for t in bpe.get_added_tokens_decoder().values())
        """Texts of all tokens that are no merges, such as those that end a turn."""
        own = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=True))
        self.special_tokens = own if settings is None else _special_tokens(settings)
        """Texts of the special tokens by role: bos_token, eos_token, ..."""
        pad, bos, eos = (self._id_of(role) for role in own)
        assert eos is not None  # load_tokenizer has looked
        self.pad_id, self.eos_id = pad, eos
        begins = self._begins_with_bos(bos)
        self.start_ids = [bos] if bos is not None and begins else []
        """What every document begins with: <bos>, where the tokenizer puts one."""

    @property
    def is_own(self) -> bool:
        """Whether it is one of gossamer's."""
        return self._settings is None

    @property
    def vocab_size(self) -> int:
        """Tokens in all, specials included; more than the highest id."""
        return max(self._bpe.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; faster than one by one."""
        return [e.ids for e in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text without specials; bytes that are no UTF-8 become U+FFFD."""
        return self._bpe.decode(list(token_ids), skip_special_tokens=True)

    def encode_spelled(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Of each text its token ids and the characters [start, stop) of each token.

        Special tokens that a text spells are those tokens: for rendered chats.
        """
        encodings = self._spelled.encode_batch(texts, add_special_tokens=False)
        return [(e.ids, e.offsets) for e in encodings]

    def fingerprint(self) -> str:
        """Hash of all that decides which tokens a text or a conversation becomes."""
        parts = (self._bpe.to_str(), self.special_tokens, self.start_ids, self.chat_template)
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def hf_fields(self) -> dict[str, int | None]:
        """Fields of a Hugging Face config that the tokenizer decides."""
        return {
            "vocab_size": self.vocab_size,
            "pad_token_id": self.pad_id,
            "bos_token_id": self._id_of("bos_token"),
            "eos_token_id": self.eos_id,
        }

    def save(self, path: Path) -> None:
        """Writes tokenizer.json, and beside it settings and chat template, if there are any."""
        # first what lies beside it: a run that finds tokenizer.json has all of it
        if self.chat_template is not None:
            _write(path.with_name(TEMPLATE_FILE), self.chat_template)
        if self._settings is not None:
            _write(path.with_name(SETTINGS_FILES[-1]), json.dumps(self._settings, indent=1))
        _write(path, self._bpe.to_str())

    def write_hf(self, folder: Path) -> None:
        """Writes the files from which transformers.AutoTokenizer loads this tokenizer."""
        from transformers import PreTrainedTokenizerFast

        if self.is_own:
            fast = PreTrainedTokenizerFast(tokenizer_object=self._bpe, **self.special_tokens)
            fast.chat_template = self.chat_template
            fast.save_pretrained(folder)
        else:
            self.save(folder / TOKENIZER_FILE)

    def _id_of(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self._bpe.token_to_id(text)

    def _begins_with_bos(self, bos: int | None) -> bool:
        """Whether transformers would begin a text with it."""
        if self._settings is None:
            return True
        told = self._settings.get("add_bos_token")
        return bos in self._bpe.encode("").ids if told is None else bool(told)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json and what lies beside it: ours, or a Hugging Face folder's.

    Raises ValueError, naming the file, for what is no tokenizer or names no end-of-sequence token.
    """
    try:
        bpe = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{path}: expected a tokenizer of gossamer's or a Hugging Face folder's ({error})"
        ) from error
    settings: dict[str, Any] = {}
    for file in (path.with_name(name) for name in SETTINGS_FILES):
        if file.is_file():
            settings |= _read_object(file)
    template: Any = settings.pop("chat_template", None)
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if path.with_name(TEMPLATE_FILE).is_file():
        template = path.with_name(TEMPLATE_FILE).read_text(encoding="utf-8")
    if tuple(bpe.id_to_token(i) for i in range(len(SPECIALS))) == SPECIALS:
        return Tokenizer(bpe, chat_template=template)
    eos = _special_tokens(settings).get("eos_token")
    if eos is None or bpe.token_to_id(eos) is None:
        raise ValueError(
            f"{path}: the eos_token is {eos!r}; expected a tokenizer whose first tokens are"
            f" {SPECIALS}, or a tokenizer_config.json beside it that names a token of it"
        )
    return Tokenizer(bpe, settings, template)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is a {type(value).__name__}; expected an object")
    return value


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Each `..._token` that is set; Hugging Face writes a text, or an object with its content."""
    found = {}
    for role, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if role.endswith("_token") and isinstance(text, str):
            found[role] = text
    return found


def _write(path: Path, text: str) -> None:
    """The file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
