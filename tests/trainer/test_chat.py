"""What of a conversation is learned: by hand, and against transformers' own assistant masks."""

from dataclasses import replace

import hf_tokenizers
import numpy as np
import pytest
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.data.chat import chat_documents, checked_messages, render
from gossamer.trainer.data.config import DataConfig
from gossamer.trainer.data.mixture import task_conversations, task_source
from gossamer.trainer.task import Problem
from gossamer.trainer.tokenizer import PLAIN_TEMPLATE, load_tokenizer, train_tokenizer
from transformers import AutoTokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 4?"},
    {"role": "assistant", "content": "The answer is 21."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "naïve 你好"},
]


def learned_texts(tokenizer, document) -> list[str]:
    """The stretches of a document that are learned, specials shown."""
    ids, is_learned = np.asarray(document.token_ids), np.asarray(document.is_learned)
    edges = np.flatnonzero(np.diff(np.r_[0, is_learned.astype(int), 0]))
    decode = tokenizer._spelled.decode
    return [
        decode(ids[start:stop].tolist(), skip_special_tokens=False)
        for start, stop in edges.reshape(-1, 2)
    ]


def documents_of(tokenizer, messages, seq_len=500, drops_long=False):
    rendered = [render(tokenizer, checked_messages(messages))]
    return list(chat_documents(tokenizer, rendered, seq_len, drops_long))


@pytest.mark.parametrize("template", [hf_tokenizers.CHATML, hf_tokenizers.MARKED_CHATML])
def test_answers_are_learned_with_what_ends_a_turn(tmp_path, template):
    tokenizer = load_tokenizer(hf_tokenizers.qwen_like(tmp_path, template) / "tokenizer.json")
    (document,) = documents_of(tokenizer, CONVERSATION)
    answers = [m["content"] + "<|im_end|>" for m in CONVERSATION if m["role"] == "assistant"]
    assert learned_texts(tokenizer, document) == answers


def test_marks_are_read_as_transformers_reads_them(tmp_path):
    folder = hf_tokenizers.qwen_like(tmp_path, hf_tokenizers.MARKED_CHATML)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CONVERSATION, return_dict=True, return_assistant_tokens_mask=True
    )
    (document,) = documents_of(load_tokenizer(folder / "tokenizer.json"), CONVERSATION)
    assert expected["input_ids"] == document.token_ids.tolist()
    assert expected["assistant_masks"] == document.is_learned.astype(int).tolist()


def test_a_template_without_marks_that_ends_turns_by_eos(tmp_path):
    folder = hf_tokenizers.mistral_like(tmp_path)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    (document,) = documents_of(tokenizer, CONVERSATION[1:])
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CONVERSATION[1:], return_dict=True)["input_ids"]
    assert document.token_ids.tolist() == expected
    answers = [" " + m["content"] + "</s>" for m in CONVERSATION if m["role"] == "assistant"]
    assert [t.lstrip() for t in learned_texts(tokenizer, document)] == [a.lstrip() for a in answers]


def test_where_thoughts_are_forgotten_each_turn_is_a_document(tmp_path):
    folder = hf_tokenizers.qwen_like(tmp_path, hf_tokenizers.FORGETS_THOUGHTS)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    thinking = [{**m, "thought": "so"} for m in CONVERSATION]
    first, second = documents_of(tokenizer, thinking)
    assert learned_texts(tokenizer, first) == ["<think>so</think>The answer is 21.<|im_end|>"]
    assert learned_texts(tokenizer, second) == ["<think>so</think>naïve 你好<|im_end|>"]
    text = tokenizer._spelled.decode(second.token_ids.tolist(), skip_special_tokens=False)
    assert text.count("<think>") == 1  # the earlier turn as the model will see it


def test_long_conversations_are_cut_or_dropped(tmp_path):
    tokenizer = load_tokenizer(hf_tokenizers.qwen_like(tmp_path) / "tokenizer.json")
    (whole,) = documents_of(tokenizer, CONVERSATION)
    size, first = len(whole.token_ids), int(np.flatnonzero(whole.is_learned)[0])
    for drops_long in (False, True):
        (kept,) = documents_of(tokenizer, CONVERSATION, size, drops_long)
        assert kept.token_ids.tolist() == whole.token_ids.tolist()
    assert documents_of(tokenizer, CONVERSATION, size - 1, drops_long=True) == []
    (cut,) = documents_of(tokenizer, CONVERSATION, first + 1)
    assert cut.token_ids.tolist() == whole.token_ids[: first + 1].tolist()
    assert cut.is_learned.tolist() == [False] * first + [True]
    assert documents_of(tokenizer, CONVERSATION, first) == []  # no answer is left


def test_what_comes_after_the_last_answer_is_left_out(tmp_path):
    tokenizer = load_tokenizer(hf_tokenizers.qwen_like(tmp_path) / "tokenizer.json")
    longer = [*CONVERSATION, {"role": "user", "content": "Bye"}]
    (one,), (other,) = (documents_of(tokenizer, m) for m in (CONVERSATION, longer))
    assert one.token_ids.tolist() == other.token_ids.tolist()


def test_tools_and_calls_without_content_reach_the_template(tmp_path):
    template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    folder = hf_tokenizers.qwen_like(tmp_path, template)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "name": None}
    messages = checked_messages([{"role": "user", "content": "Add"}, call])
    ((text, spans),) = render(tokenizer, messages, [{"name": "add"}])
    assert text.startswith('[{"name": "add"}]')
    assert [text[slice(*span)] for span in spans] == ['[{"name": "add"}]<|im_end|>']


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("hello", "is 'hello'; expected a list of objects"),
        ([["user", "hello"]], "expected a list of objects with role and content"),
        ([{"role": "user", "content": "x"}], "no message of role assistant"),
        ([{"content": "x"}], "has message 0 .*expected role and content"),
        ([{"role": "assistant", "content": 5}], "has message 0 .*expected role and content"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked_messages(messages)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('only users') }}", "is refused by the chat template: only users"),
        ("{{ messages[0].content + 1 }}", "is refused by the chat template"),
        ("{% for %}", "is refused by the chat template"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}",
            "has message 2, which the chat template does not write where its generation prompt",
        ),
    ],
)
def test_what_a_template_refuses_is_said(tmp_path, template, sentence):
    tokenizer = load_tokenizer(hf_tokenizers.qwen_like(tmp_path, template) / "tokenizer.json")
    with pytest.raises(ValueError, match=sentence):
        render(tokenizer, CONVERSATION)


def test_our_own_tokenizer_writes_a_problem_as_a_task_does():
    problems = [Problem(problem_id=i, question=f"{i} + 1 =", answer=f"{i + 1}") for i in range(9)]
    tokenizer = train_tokenizer([p.text for p in problems], TokenizerConfig(vocab_size=261))
    tokenizer.chat_template = PLAIN_TEMPLATE
    config = DataConfig(task_share=1.0, seq_len=64)
    chats = task_conversations(tokenizer, problems, config).documents
    texts = task_source(tokenizer, problems, 1.0, answer_only=True).documents
    for chat, text in zip(chats, texts, strict=True):
        assert chat.token_ids.tolist() == text.token_ids
        assert chat.is_learned.tolist() == [
            place >= text.learn_from for place in range(len(text.token_ids))
        ]
    dropping = replace(config, seq_len=3, long_conversations="drop")
    assert task_conversations(tokenizer, problems, dropping).documents == []
