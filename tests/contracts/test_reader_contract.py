"""What every Reader must do, for each registered name; an outsider runs it over a class of his."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from gossamer.trainer.data.config import SourceConfig
from gossamer.trainer.data.reader import READERS, build_reader
from gossamer.trainer.data.readers import hf, jsonl

TEXTS = [f"text {i} {'long ' * (i % 7)}é\n" for i in range(70)]
RECORDS = [{"text": text} for text in TEXTS]
LINES = "".join(f"{json.dumps(record)}\n" for record in RECORDS).encode()


def write_parquet(folder: Path) -> None:
    for number, rows in enumerate((RECORDS[:40], RECORDS[40:])):
        table = pyarrow.Table.from_pylist([{**row, "other": 1} for row in rows])
        pyarrow.parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=16)


def write_lines(folder: Path) -> None:
    (folder / "b.jsonl").write_bytes(LINES.replace(b"\n", b"\n \n", 30))


def write_gzip(folder: Path) -> None:
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))


def write_zstd(folder: Path) -> None:
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(LINES))


def write_text(folder: Path) -> None:
    for number, text in enumerate(TEXTS):
        (folder / f"{number // 30}").mkdir(exist_ok=True)
        (folder / f"{number // 30}" / f"{number:03}.txt").write_text(text, encoding="utf-8")


def write_hf(folder: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder)


def write_hf_splits(folder: Path) -> None:
    train = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=train, test=train.take(3)).save_to_disk(folder)


WRITERS: dict[str, list[Callable[[Path], None]]] = {
    "parquet": [write_parquet],
    "jsonl": [write_lines, write_gzip, write_zstd],
    "text": [write_text],
    "hf": [write_hf, write_hf_splits],
}
CASES = [(kind, write) for kind in READERS for write in WRITERS[kind]]


@pytest.fixture(params=CASES, ids=lambda case: case[1].__name__)
def reader(request, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 300)
    monkeypatch.setattr(hf, "ROWS", 25)
    monkeypatch.setattr(hf, "ROWS_AT_A_TIME", 4)
    kind, write = request.param
    write(tmp_path)
    return build_reader(SourceConfig(kind=kind, path=str(tmp_path)))


def test_blocks_hold_every_record_once_and_in_order(reader):
    assert [record for block in reader.blocks() for record in reader.read(block, 0)] == RECORDS
    assert reader.blocks() == reader.blocks()


def test_a_block_is_read_on_from_any_record(reader):
    for block in reversed(reader.blocks()):
        records = list(reader.read(block, 0))
        for skip in range(len(records) + 2):
            assert list(reader.read(block, skip)) == records[skip:]


def test_every_record_has_a_place_of_its_own(reader):
    blocks = reader.blocks()
    places = [
        reader.where(block, number)
        for block in blocks
        for number in range(len(list(reader.read(block, 0))))
    ]
    assert len(set(places)) == len(RECORDS)


@pytest.mark.parametrize("kind", READERS)
def test_no_file_is_one_sentence(kind, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/gone .*expected|{tmp_path}/gone cannot"):
        build_reader(SourceConfig(kind=kind, path=f"{tmp_path}/gone"))


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.sources.kind is 'xml'; expected one of"):
        build_reader(SourceConfig(kind="xml", path=str(tmp_path)))
