import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gossamer.trainer.batch import Document
from gossamer.trainer.config import DataConfig, TokenizerConfig
from gossamer.trainer.corpus import read_documents
from gossamer.trainer.data.mixture import corpus_source, task_source
from gossamer.trainer.data.source import Source
from gossamer.trainer.data.stream import TokenStream, build_loader
from gossamer.trainer.task import Problem, answer_ids, prompt_ids
from gossamer.trainer.tokenizer import BOS_ID, EOS_ID, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = DataConfig(seq_len=32, num_rows=4, corpus_chars=20_000)
PROBLEMS = [
    Problem(problem_id=i, question=f"What is {i} + {2 * i} =", answer=str(3 * i))
    for i in range(10, 60)
]
TEXTS = list(read_documents(None, CONFIG.corpus_chars))
TOKENIZER = train_tokenizer([*(p.text for p in PROBLEMS), *TEXTS], TokenizerConfig(vocab_size=300))
SOURCES = [
    task_source(TOKENIZER, PROBLEMS, share=0.75, answer_only=False),
    corpus_source(TOKENIZER, TEXTS, share=0.25, seq_len=CONFIG.seq_len),
]


def _take(batches, num):
    return [[tensor.clone() for tensor in next(batches).to_tensors()] for _ in range(num)]


def _equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b)
        for x, y in zip(left, right, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def _documents(batch):
    """The documents of a batch, cut apart at the restarts of position ids."""
    for ids, positions in zip(
        batch.token_ids_BS.tolist(), batch.position_ids_BS.tolist(), strict=True
    ):
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            if any(ids[start:stop]):
                yield ids[start:stop]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**31))
def test_resume_anywhere_is_bit_exact(steps, seed):
    whole = build_loader(SOURCES, CONFIG, seed)
    batches = iter(whole)
    _take(batches, steps)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = _take(batches, 15)
    resumed = build_loader(SOURCES, CONFIG, seed)
    resumed.load_state_dict(state)
    assert _equal(_take(iter(resumed), 15), expected)


def test_seed_orders_the_rows_and_torch_randomness_is_left_alone():
    before = torch.get_rng_state()
    first = _take(iter(build_loader(SOURCES, CONFIG, 1)), 3)
    assert _equal(first, _take(iter(build_loader(SOURCES, CONFIG, 1)), 3))
    assert not _equal(first, _take(iter(build_loader(SOURCES, CONFIG, 2)), 3))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_shows_each_problem_once_and_the_next_in_another_order():
    source = task_source(TOKENIZER, PROBLEMS, share=1.0, answer_only=False)
    whole = [prompt_ids(TOKENIZER, p) + answer_ids(TOKENIZER, p) for p in PROBLEMS]
    stream = TokenStream([source], replace(CONFIG, num_rows=1), seed=0)
    epochs = []
    for epoch in range(2):
        seen = []
        while len(seen) < len(PROBLEMS):
            seen += list(_documents(next(stream)))
        assert stream.state_dict()["counters"][0]["epoch"] == epoch
        seen = [_without_padding(ids) for ids in seen]
        assert sorted(seen) == sorted(whole)
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def _without_padding(ids):
    return ids[: ids.index(EOS_ID) + 1]


def test_rows_follow_the_shares_exactly():
    stream = TokenStream(SOURCES, CONFIG, seed=0)
    for steps in range(1, 30):
        next(stream)
        drawn = [counters["drawn"] for counters in stream.state_dict()["counters"]]
        assert drawn == [3 * steps, steps]


def test_corpus_windows_join_to_the_texts():
    texts = ["def f():\n    return 42\n" * 9, "x"]
    source = corpus_source(TOKENIZER, texts, share=1.0, seq_len=16)
    assert max(len(document.token_ids) for document in source.documents) == 16
    joined = [token for document in source.documents for token in document.token_ids]
    assert joined == sum([[BOS_ID, *TOKENIZER.encode(t), EOS_ID] for t in texts], [])


def test_answer_only_weighs_answers():
    for answer_only in (False, True):
        source = task_source(TOKENIZER, PROBLEMS[:1], share=1.0, answer_only=answer_only)
        batch = next(TokenStream([source], replace(CONFIG, num_rows=1), seed=0))
        prompt, answer = (f(TOKENIZER, PROBLEMS[0]) for f in (prompt_ids, answer_ids))
        learned = batch.token_ids_BS.roll(-1, 1)[batch.weights_BS == 1].tolist()
        assert learned == (answer if answer_only else prompt[1:] + answer)


@pytest.mark.parametrize(
    ("sources", "config", "seed", "sentence"),
    [
        (SOURCES, CONFIG, 1, "seed is 1"),
        (SOURCES, replace(CONFIG, num_rows=5), 0, "num_rows is 5"),
        (SOURCES[:1] + [replace(SOURCES[1], documents=SOURCES[1].documents[1:])], CONFIG, 0,
         "fingerprint of corpus"),
        ([replace(SOURCES[0], share=1.0)], CONFIG, 0, "fingerprint of corpus is None"),
    ],
)  # fmt: skip
def test_resume_on_other_data_is_refused(sources, config, seed, sentence):
    saved = build_loader(SOURCES, CONFIG, 0)
    next(iter(saved))
    other = build_loader(sources, config, seed)
    other.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=f"data: {sentence}.*expected the same corpus"):
        iter(other)


def test_fingerprint_sees_tokens_boundaries_and_weights():
    def fingerprint(*documents):
        return Source(name="x", share=1.0, documents=list(documents)).fingerprint()

    base = fingerprint(Document(token_ids=[1, 2, 3]), Document(token_ids=[4]))
    assert base != fingerprint(Document(token_ids=[1, 2]), Document(token_ids=[3, 4]))
    assert base != fingerprint(Document(token_ids=[1, 2, 3], learn_from=1), Document(token_ids=[4]))
    learned = Document(token_ids=[1, 2, 3], is_learned=np.array([False, True, False]))
    assert base != fingerprint(learned, Document(token_ids=[4]))
    assert base == fingerprint(Document(token_ids=[1, 2, 3]), Document(token_ids=[4]))


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ([Source(name="a", share=0.5, documents=[Document(token_ids=[1])])], "sum to 0.5"),
        ([Source(name="a", share=1.0, documents=[])], "'a' holds no documents"),
        ([Source(name="a", share=1.0, documents=[Document(token_ids=[1] * 33)])], "seq_len 32"),
    ],
)
def test_unusable_sources_are_refused(sources, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(TokenStream(sources, CONFIG, seed=0))
