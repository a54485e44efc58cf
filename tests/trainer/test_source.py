"""Files as windows of documents: order, epochs, replicas, places to go on from, bad records."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.data import source as source_module
from gossamer.trainer.data.config import DataConfig, SourceConfig
from gossamer.trainer.data.readers import jsonl
from gossamer.trainer.data.source import START, FileSource, Source, is_heldout
from gossamer.trainer.data.stream import TokenStream, build_loader
from gossamer.trainer.tokenizer import train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENIZER = train_tokenizer(["no merges"], TokenizerConfig(vocab_size=259))
DATA = DataConfig(seq_len=40, num_rows=3, task_share=0.0, buffer_tokens=150)
TEXTS = [f"{number:03} {'x' * (number * 7 % 30)}" for number in range(60)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 200)
    monkeypatch.setattr(source_module, "RECORDS_AT_A_TIME", 3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number, texts in enumerate((TEXTS[:40], TEXTS[40:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


def file_source(path, data=DATA, **fields) -> FileSource:
    config = SourceConfig(kind="jsonl", path=str(path))
    return FileSource(
        name="sources[0]", share=1.0, config=config, data=data, tokenizer=TOKENIZER, **fields
    )


def texts_of(documents) -> list[str]:
    return [TOKENIZER.decode(document.token_ids) for document in documents]


def epoch_of(source, seed=0, epoch=0) -> tuple[list[str], int, int]:
    """An epoch's texts, how many windows it took, and the most tokens that one held."""
    texts, sizes, start = [], [], START
    while start is not None:
        window = source.window(seed, epoch, start)
        texts += texts_of(window.documents)
        sizes.append(sum(len(d.token_ids) for d in window.documents))
        start = window.stop
    return texts, len(sizes), max(sizes)


def rows_of(batch) -> list[str]:
    return [TOKENIZER.decode(ids) for ids in batch.token_ids_BS.tolist()]


def take(stream, num) -> list[list[str]]:
    return [rows_of(next(stream)) for _ in range(num)]


def test_an_epoch_shows_every_text_once_through_small_windows(path):
    source = file_source(path)
    first, num_windows, most_tokens = epoch_of(source)
    assert sorted(first) == TEXTS != first
    assert num_windows > 5 and most_tokens < DATA.buffer_tokens + 3 * 40  # 3 records at a time
    assert epoch_of(source) == epoch_of(file_source(path))
    others = [epoch_of(source, epoch=1)[0], epoch_of(source, seed=1)[0]]
    assert all(sorted(other) == TEXTS and other != first for other in others)
    # blocks of both files are mixed, and records of a window too
    assert any(int(a[:3]) > int(b[:3]) for a, b in pairwise(first[:10]))


@pytest.mark.parametrize("block_bytes", [40, 10_000])  # blocks are dealt, or records
@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_replicas_read_disjoint_texts_and_all_of_them(path, monkeypatch, num_replicas, block_bytes):
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", block_bytes)
    for epoch in range(2):
        read = []
        for index in range(num_replicas):
            data = replace(DATA, replica_index=index, num_replicas=num_replicas)
            texts, *_ = epoch_of(file_source(path, data), epoch=epoch)
            assert len(texts) > 60 / num_replicas / 2
            if block_bytes == 40:
                assert len(file_source(path, data)._blocks) >= 8 * num_replicas
            read += texts
        assert sorted(read) == TEXTS
    held = Source(name="x", share=1.0, documents=list(range(10)), replica=(1, 3))
    shares = [replace(held, replica=(i, 3)).window(0, 0, START).documents for i in range(3)]
    assert sorted(sum(shares, [])) == list(range(10)) and len(shares[2]) == 3


@settings(max_examples=15, deadline=None)
@given(steps=st.integers(0, 30), seed=st.integers(0, 2**31))
def test_resume_in_any_window_is_bit_exact(path, steps, seed):
    source = file_source(path)
    stream = TokenStream([source], DATA, seed)
    take(stream, steps)
    state = json.dumps(stream.state_dict())
    assert len(state) < 400
    resumed = TokenStream([file_source(path)], DATA, seed, reads_ahead=True)
    resumed.load_state_dict(json.loads(state))
    assert take(resumed, 12) == take(stream, 12)


def test_the_loader_resumes_and_no_text_comes_twice_or_is_lost(path):
    epochs = 3
    seen: Counter[str] = Counter()
    loader = build_loader([file_source(path)], DATA, seed=4)
    batches = iter(loader)
    while not seen or min(seen[text] for text in TEXTS) < epochs:
        for row in rows_of(next(batches)):
            seen.update(text for text in TEXTS if text in row)
        loader, state = build_loader([file_source(path)], DATA, seed=4), loader.state_dict()
        loader.load_state_dict(state)
        batches = iter(loader)
    # within an epoch of one another: rows of the last batch may belong to the next
    assert max(seen.values()) <= epochs + 1


def test_rows_follow_the_shares_of_a_mixture(path, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    sources = [
        replace(file_source(path), share=0.75),
        replace(file_source(tmp_path), name="sources[1]", share=0.25),
    ]
    stream = TokenStream(sources, replace(DATA, num_rows=4), seed=0)
    for batch in take(stream, 40):
        assert sum(row.startswith("other") for row in batch) == 1


def test_held_out_texts_are_the_same_and_never_trained_on(path):
    train = file_source(path, heldout_permille=200)
    heldout = replace(train, reads_heldout=True)
    kept, left = epoch_of(train)[0], epoch_of(heldout, seed=3)[0]
    assert sorted(kept + left) == TEXTS and 3 < len(left) < 25
    assert all(is_heldout(text, 200) for text in left)
    with pytest.raises(ValueError, match=r"source 'sources\[0\]' holds no documents"):
        next(TokenStream([replace(heldout, heldout_permille=0)], DATA, seed=0))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, data=replace(s.data, buffer_tokens=151)),
        lambda s: replace(s, data=replace(s.data, replica_index=1, num_replicas=2)),
        lambda s: replace(s, heldout_permille=5),
        lambda s: replace(s, config=replace(s.config, path=f"{s.config.path}/0.jsonl")),
        lambda s: replace(s, config=replace(s.config, text_field="other")),
        lambda s: replace(
            s, tokenizer=train_tokenizer(["aaaa"], TokenizerConfig(vocab_size=260))
        ),
    ],
)  # fmt: skip
def test_resume_on_other_files_is_refused(path, change):
    saved = TokenStream([file_source(path)], DATA, 0)
    other = change(file_source(path))
    with pytest.raises(ValueError, match="data: .* expected the same corpus"):
        TokenStream([other], other.data, 0).load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"body": "x"}, r"a.jsonl, line 2: field 'text' is missing; the record has \['body'\]"),
        ({"text": 5}, "a.jsonl, line 2: field 'text' is a int; expected text"),
        ({"text": None}, "a.jsonl, line 2: field 'text' is a NoneType; expected text"),
    ],
)
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_a_bad_record_is_named_by_file_line_and_field(tmp_path, line, sentence, reads_ahead):
    lines = [{"text": "good"}, line]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=sentence):
        next(TokenStream([file_source(tmp_path)], DATA, 0, reads_ahead))


def test_a_bad_conversation_is_named_by_file_line_and_field(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user"}]}))
    config = SourceConfig(kind="jsonl", path=str(tmp_path), messages_field="messages")
    with pytest.raises(ValueError, match="a.jsonl, line 1: field 'messages' has no message of"):
        next(TokenStream([replace(file_source(tmp_path), config=config)], DATA, 0))
