"""Which sources the phases of a kind read, and at what shares of the rows.

The one idea: next_token phases read task problems and texts; sft phases read the problems as
conversations, and conversations. What is held out are the same sources read the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gossamer.trainer.batch import Document
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.corpus import read_documents
from gossamer.trainer.data.chat import chat_documents, render
from gossamer.trainer.data.config import DataConfig
from gossamer.trainer.data.source import FileSource, Source, is_heldout, text_documents
from gossamer.trainer.task import Problem, TaskProblems, answer_ids, prompt_ids
from gossamer.trainer.tokenizer import Tokenizer


def build_sources(
    config: TrainConfig, tokenizer: Tokenizer, problems: TaskProblems | None, kind: str
) -> list[Source | FileSource]:
    """What phases of `kind` train on, without what is held out.

    Raises ValueError for sources that cannot be read.
    """
    data = config.data
    sources: list[Source | FileSource] = []
    if problems is not None and data.task_share > 0:
        if kind == "sft":
            task = task_conversations(tokenizer, problems.train, data)
        else:
            task = task_source(tokenizer, problems.train, data.task_share, data.answer_only)
        sources.append(replace(task, replica=(data.replica_index, data.num_replicas)))
    if data.task_share < 1:
        permille = config.heldout.permille if config.heldout.every_steps else 0
        sources += _texts(data, tokenizer, kind, 1 - data.task_share, permille, reads_heldout=False)
    return sources


def heldout_sources(
    config: TrainConfig, tokenizer: Tokenizer, problems: TaskProblems | None, kind: str
) -> list[Source | FileSource]:
    """What build_sources leaves out, the same for every replica: of texts for next_token phases, of
    problems and conversations for sft phases.
    """
    num_tokens = config.heldout.num_rows * config.data.seq_len
    data = replace(config.data, replica_index=0, num_replicas=1, buffer_tokens=num_tokens)
    if kind == "next_token":
        data = replace(data, task_share=0.0)
    sources: list[Source | FileSource] = []
    if problems is not None and data.task_share > 0:
        sources.append(task_conversations(tokenizer, problems.heldout, data))
    if data.task_share < 1:
        share, permille = 1 - data.task_share, config.heldout.permille
        sources += _texts(data, tokenizer, kind, share, permille, reads_heldout=True)
    return sources


def _texts(
    data: DataConfig,
    tokenizer: Tokenizer,
    kind: str,
    share: float,
    permille: int,
    reads_heldout: bool,
) -> list[Source | FileSource]:
    """Files of the kind; without any, next_token phases read the corpus."""
    chosen = [
        (number, source)
        for number, source in enumerate(data.sources)
        if (source.messages_field is not None) == (kind == "sft")
    ]
    if not chosen:
        texts = read_documents(data.corpus_path, data.corpus_chars)
        kept = (text for text in texts if is_heldout(text, permille) == reads_heldout)
        corpus = corpus_source(tokenizer, kept, share, data.seq_len)
        return [replace(corpus, replica=(data.replica_index, data.num_replicas))]
    total = sum(source.share for _, source in chosen)
    return [
        FileSource(
            name=f"sources[{number}]",
            share=share * source.share / total,
            config=source,
            data=data,
            tokenizer=tokenizer,
            heldout_permille=permille,
            reads_heldout=reads_heldout,
        )
        for number, source in chosen
    ]


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


def task_conversations(tokenizer: Tokenizer, problems: list[Problem], data: DataConfig) -> Source:
    """Each problem as a question and its answer, as the chat template writes them."""
    rendered = [
        render(
            tokenizer,
            [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.answer},
            ],
        )
        for problem in problems
    ]
    drops_long = data.long_conversations == "drop"
    documents = list(chat_documents(tokenizer, rendered, data.seq_len, drops_long))
    return Source(name="task", share=data.task_share, documents=documents)


def corpus_source(tokenizer: Tokenizer, texts: Iterable[str], share: float, seq_len: int) -> Source:
    """Each text between the tokens that begin and end a document, in windows of seq_len tokens."""
    documents: list[Document] = []
    for text_ids in tokenizer.encode_all(list(texts)):
        documents += text_documents(tokenizer, text_ids, seq_len)
    return Source(name="corpus", share=share, documents=documents)
