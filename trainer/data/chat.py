"""Conversations as documents: a chat template, and the loss on what the assistant says.

The one idea: what is learned is what the model will have to write. A template that marks it, by
{% generation %}, is taken at its word. Of any other, a turn is what comes after the rendering of
all before it with the generation prompt; where a template shows earlier turns otherwise than it
showed them when they were written (thoughts left out), each turn is a document of its own.

Rendered by transformers, whose templates these are.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gossamer.trainer.batch import Document
from gossamer.trainer.tokenizer import Tokenizer

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]
_RENDERING = threading.Lock()  # a compiled template keeps the spans it finds in itself


def checked_messages(value: object) -> Messages:
    """The conversation up to its last answer; fields that are None are left out.

    Raises ValueError for anything but a list of messages with a role, one of them the assistant's.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"is {_brief(value)}; expected a list of objects with role and content")
    messages = [{k: v for k, v in message.items() if v is not None} for message in value]
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content", "")
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise ValueError(f"has message {number} {_brief(message)}; expected role and content")
        message.setdefault("content", "")  # a message of tool calls alone
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("has no message of role assistant; expected at least one")
    return messages[: answers[-1] + 1]


def render(
    tokenizer: Tokenizer, messages: Messages, tools: list | None = None
) -> list[tuple[str, Spans]]:
    """The conversation as texts, each with the characters [start, stop) that are learned.

    One text, or one for each turn of the assistant. Raises ValueError for what the tokenizer's
    chat template refuses.
    """

    def rendered(messages: Messages, prompt: bool = False) -> tuple[str, Spans]:
        return _render(tokenizer, messages, tools, prompt)

    text, spans = rendered(messages)
    if _is_marked(tokenizer):
        return [(text, spans)]
    turns = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, _ = rendered(messages[:number], prompt=True)
            until, _ = rendered(messages[: number + 1])
            if not until.startswith(before):
                raise ValueError(
                    f"has message {number}, which the chat template does not write where its"
                    " generation prompt ends; expected a template with {% generation %}"
                )
            end = until.rstrip()
            if not end.endswith(tokenizer.added_tokens):
                end = until  # else what comes after is not the assistant's
            turns.append((until, [(len(before), len(end))]))
    if all(text.startswith(until) for until, _ in turns):
        return [(text, [span for _, (span,) in turns])]
    return turns


def _is_marked(tokenizer: Tokenizer) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or "") is not None


def _render(
    tokenizer: Tokenizer, messages: Messages, tools: list | None, prompt: bool
) -> tuple[str, Spans]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    roles: dict[str, Any] = dict(tokenizer.special_tokens)
    try:
        with _RENDERING:
            found: Any = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=tokenizer.chat_template,
                return_assistant_tokens_mask=_is_marked(tokenizer),
                add_generation_prompt=prompt,
                **roles,
            )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"is refused by the chat template: {error}") from error
    texts, spans = found
    return texts[0], [(start, stop) for start, stop in spans[0]] if spans else []


def chat_documents(
    tokenizer: Tokenizer,
    rendered: Sequence[list[tuple[str, Spans]]],
    seq_len: int,
    drops_long: bool,
) -> Iterator[Document]:
    """Documents of rendered conversations, none longer than seq_len tokens.

    A longer one keeps its beginning or is dropped; one in which nothing is learned is dropped.
    """
    texts = [text for conversation in rendered for text in conversation]
    encoded = tokenizer.encode_spelled([text for text, _ in texts])
    for (_, spans), (token_ids, places) in zip(texts, encoded, strict=True):
        if drops_long and len(token_ids) > seq_len:
            continue
        starts = np.array([start for start, _ in places[:seq_len]])
        is_learned = np.zeros(len(starts), dtype=bool)
        for start, stop in spans:
            is_learned |= (start <= starts) & (starts < stop)
        if is_learned[1:].any():
            ids = np.array(token_ids[:seq_len], dtype=np.int32)
            yield Document(token_ids=ids, is_learned=is_learned)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
