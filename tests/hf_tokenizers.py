"""Hugging Face folders with small tokenizers of the kinds that models come with."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["What is 17 + 4? The answer is 21.", "user assistant system\n", "Hello, naïve world! 你好"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>' + message.thought + '</think>'"
    " }}{% endif %}{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)


def qwen_like(folder: Path, chat_template: str | None = CHATML) -> Path:
    """Byte-level, no <bos>, the token that ends a turn is not the one that ends a text."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _train(bpe, [], pre_tokenizers.ByteLevel.alphabet())
    bpe.add_special_tokens(specials)  # behind the others: token 0 is a token like any other
    return _save(bpe, folder, chat_template, eos_token=specials[0], pad_token=specials[0])


def llama_like(folder: Path, chat_template: str | None = None) -> Path:
    """Byte-level, its post-processor puts <|begin_of_text|> before every text; truncates."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    _train(bpe, [], pre_tokenizers.ByteLevel.alphabet())
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    bpe.add_special_tokens([bos, eos])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    bpe.enable_truncation(4)
    return _save(bpe, folder, chat_template, bos_token=bos, eos_token=eos)


def mistral_like(folder: Path, chat_template: str | None = MISTRAL) -> Path:
    """As SentencePiece: a blank is ▁, and it is the config that asks for <s>."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    _train(bpe, specials, ["\n", *map(chr, range(33, 127))])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return _save(bpe, folder, chat_template, **tokens, add_bos_token=True)


def _train(bpe: tokenizers.Tokenizer, specials: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 320,
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 4, trainer)


def _save(bpe, folder: Path, chat_template: str | None, **settings) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **settings)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder
