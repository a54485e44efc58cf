"""Events of several processes in a store: each line once, in order; what was put is not lost."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from gossamer.comm.store import StoreError, open_store
from gossamer.comm.store.serve import serve
from gossamer.trainer import event_store
from gossamer.trainer.event_store import FOLDER, LiveTail, StoreLines, StoreTail


def line(number: int, time_s: float, pad: int = 0) -> bytes:
    return (
        json.dumps({"event": "e", "time_s": time_s, "n": number, "pad": "x" * pad}) + "\n"
    ).encode()


def numbers(lines: list[bytes]) -> list[int]:
    return [json.loads(each)["n"] for each in lines]


@pytest.fixture(params=["file", "http"])
def url(tmp_path, request):
    folder = tmp_path / "run"
    if request.param == "file":
        yield folder.as_uri()
    else:
        server = serve(open_store(folder, create=True), writable=True)
        yield server.url
        server.close()


@pytest.fixture
def writer(url):
    open_store(url, create=True)
    return StoreLines(url)


def test_lines_come_once_and_in_order_over_many_segments(url, writer, monkeypatch):
    monkeypatch.setattr(event_store, "SEGMENT_BYTES", 500)
    tail, seen = StoreTail(url), []
    for number in range(40):
        writer.add(line(number, number, pad=60))
        if number % 3 == 0:
            writer.flush()
            seen += numbers(tail.read())
    writer.flush()
    assert seen + numbers(tail.read(is_last=True)) == list(range(40))
    assert tail.read(is_last=True) == [] and numbers(StoreTail(url).read()) == list(range(40))
    store = open_store(url)
    (name,) = store.list(FOLDER)
    segments = store.list(name.removesuffix(".json") + "/")
    assert len(segments) > 2
    assert all(store.size(each) >= 500 for each in segments[:-1])


def test_writers_are_merged_by_time_and_each_keeps_its_order(url, writer):
    other = StoreLines(url)
    for number, time_s in ((0, 1.0), (2, 3.0), (3, 2.5), (5, 6.0)):  # a clock that was set back
        writer.add(line(number, time_s))
    for number, time_s in ((1, 2.0), (4, 4.0)):
        other.add(line(number, time_s))
    writer.flush()
    other.flush()
    assert numbers(StoreTail(url).read()) == [0, 1, 2, 3, 4, 5]


def test_a_line_is_there_a_second_later_without_a_flush(url, writer):
    for number in range(3):
        writer.add(line(number, number))
        time.sleep(0.05)
    deadline_s, tail, seen = time.monotonic() + 60, StoreTail(url), []
    while len(seen) < 3 and time.monotonic() < deadline_s:
        seen += numbers(tail.read())
        time.sleep(0.02)
    assert seen == [0, 1, 2]


def _write_until_killed(url: str, told) -> None:  # noqa: ANN001
    lines = StoreLines(url)
    for number in range(1000):
        lines.add(line(number, time.time()))
        if number % 10 == 9:
            lines.flush()
            told.send(number)
        time.sleep(0.001)


def test_what_was_flushed_survives_sigkill(url):
    open_store(url, create=True)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_write_until_killed, args=(url, theirs)
    )
    process.start()
    while (flushed := ours.recv()) < 49:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while ours.poll():
        flushed = ours.recv()
    seen = numbers(StoreTail(url).read())
    assert seen == list(range(len(seen))) and len(seen) > flushed


def test_an_outage_costs_neither_lines_nor_the_run(url, writer, monkeypatch):
    put, is_down = writer._store.put, [True]

    def flaky(*given: object, **named: object) -> bool:
        if is_down[0]:
            raise StoreError("the store is away")
        return put(*given, **named)

    monkeypatch.setattr(writer._store, "put", flaky)
    writer.add(line(0, 0.0))
    with pytest.raises(StoreError, match="away"):
        writer.flush()
    writer.add(line(1, 1.0))
    assert StoreTail(url).read() == []
    is_down[0] = False
    writer.flush()
    assert numbers(StoreTail(url).read()) == [0, 1]


def test_what_a_look_found_before_the_store_went_away_is_not_lost(url, writer, monkeypatch):
    other = StoreLines(url)
    writer.add(line(0, 0.0))
    writer.flush()
    other.add(line(1, 1.0))
    other.flush()
    tail = StoreTail(url)
    get, bad = tail._store.get, [other._writer]

    def flaky(name: str, *given: int) -> bytes:
        if any(each in name for each in bad):
            raise StoreError("the store is away")
        return get(name, *given)

    monkeypatch.setattr(tail._store, "get", flaky)
    with pytest.raises(StoreError):
        tail.read()
    bad.clear()
    assert numbers(tail.read()) == [0, 1]


def test_a_display_is_told_everything_and_never_raises(url, writer, monkeypatch):
    monkeypatch.setattr(event_store, "EVERY_S", 0.01)
    writer.add(line(0, 0.0))
    writer.flush()
    tail, seen = LiveTail(url), []
    assert numbers(tail.read()) == [0]  # the first call waits
    get = tail._tail._store.list

    def away(prefix: str) -> list[str]:
        raise StoreError("the store is away")

    monkeypatch.setattr(tail._tail._store, "list", away)
    for number in range(1, 6):
        writer.add(line(number, number))
    writer.flush()
    for _ in range(5):
        seen += numbers(tail.read())
        time.sleep(0.02)
    assert seen == []
    monkeypatch.setattr(tail._tail._store, "list", get)
    seen += numbers(tail.read_to_end())
    assert seen == [1, 2, 3, 4, 5] and tail.read_to_end() == []
