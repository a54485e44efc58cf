"""What is particular to one format: where bad input lies, patterns, cutting."""

import json
import tracemalloc

import pytest
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.data.config import DataConfig, SourceConfig
from gossamer.trainer.data.reader import build_reader, find_files, source_texts
from gossamer.trainer.data.readers import jsonl
from gossamer.trainer.data.source import FileSource
from gossamer.trainer.tokenizer import train_tokenizer


def records(kind, path, **fields):
    reader = build_reader(SourceConfig(kind=kind, path=str(path), **fields))
    return [record for block in reader.blocks() for record in reader.read(block, 0)]


@pytest.mark.parametrize("block_bytes", [7, 20, 1000])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n{"text": \n{"text": "c"}\n')
    with pytest.raises(ValueError, match=f"{path}, line 4 is not JSON"):
        records("jsonl", path)
    path.write_text('{"text": "a"}\n\n\n[1, 2]\n')
    with pytest.raises(ValueError, match=f"{path}, line 4 is a list; expected an object"):
        records("jsonl", path)


@pytest.mark.parametrize("block_bytes", range(1, 40))
def test_lines_are_cut_anywhere(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", block_bytes)
    held = [{"text": "x" * size} for size in (0, 9, 3, 17, 1)]
    text = "\n".join(map(json.dumps, held))  # the last line without an end
    (tmp_path / "a.jsonl").write_text(text)
    assert records("jsonl", tmp_path) == held


def test_files_that_are_not_of_the_format_are_named(tmp_path):
    for name in ("a.parquet", "a.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 no")
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file"):
        records("parquet", tmp_path)
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        records("text", tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=f"data.sources: {tmp_path} cannot be loaded"):
        records("hf", tmp_path)


def test_a_pattern_chooses_files_and_names_are_relative(tmp_path):
    for name in ("x/a.txt", "x/y/b.txt", "x/y/c.md", "z/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert find_files(f"{tmp_path}/x/**/*.txt", ()) == (tmp_path / "x", ["a.txt", "y/b.txt"])
    assert find_files(str(tmp_path), (".md",)) == (tmp_path, ["x/y/c.md"])
    assert find_files(f"{tmp_path}/z/d.txt", ()) == (tmp_path / "z", ["d.txt"])


def test_no_more_than_a_window_is_in_memory(tmp_path):
    line = json.dumps({"text": "some words " * 90}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 12_000)  # 12 MB
    source = FileSource(
        name="x",
        share=1.0,
        config=SourceConfig(kind="jsonl", path=str(tmp_path)),
        data=DataConfig(seq_len=128, buffer_tokens=30_000),
        tokenizer=train_tokenizer(["no merges"], TokenizerConfig(vocab_size=259)),
    )
    tracemalloc.start()
    try:
        stop = (0, 11_000)  # of the only block, near its end
        while stop is not None:
            stop = source.window(0, 0, stop).stop
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 6_000_000


def test_texts_for_a_tokenizer_are_texts_or_what_is_said(tmp_path):
    lines = [{"text": "one"}, {"chat": [{"role": "user", "content": "two"}, {"content": "three"}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = SourceConfig(kind="jsonl", path=str(tmp_path))
    assert list(source_texts(config)) == ["one"]
    config = SourceConfig(kind="jsonl", path=str(tmp_path), messages_field="chat")
    assert list(source_texts(config)) == ["two", "three"]
