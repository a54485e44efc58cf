"""A run at a URL: each host's working folder holds what the store says, and nothing older."""

import json

import pytest
from gossamer.comm.log import WeightLog
from gossamer.comm.store import StoreError, open_store
from gossamer.comm.store.serve import serve
from gossamer.trainer.event_store import StoreTail
from gossamer.trainer.metrics import EventLog, has_events
from gossamer.trainer.run_folder import (
    CACHE_VARIABLE,
    claim,
    delete_run,
    has_begun,
    inside,
    open_run,
    put_beside,
    share_files,
    url_of,
    where_of,
)
from s3_server import S3Server, s3_environment


@pytest.fixture(params=["file", "http"])
def url(tmp_path, request):
    (tmp_path / "bucket").mkdir()
    if request.param == "file":
        yield (tmp_path / "bucket" / "runs" / "demo").as_uri()
    else:
        server = serve(open_store(tmp_path / "bucket"), writable=True)
        yield f"{server.url}/runs/demo"
        server.close()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Makes this process one of the host of that name."""
    return lambda name: monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))


def begin(url: str, **files: str) -> None:
    run_dir = open_run(url, create=True)
    (run_dir / "config.json").write_text("{}")
    assert claim(run_dir)
    for name, text in files.items():
        (run_dir / f"{name}.json").write_text(text)
    share_files(run_dir, *(f"{name}.json" for name in files), "absent.json")


def test_a_plain_folder_is_itself(tmp_path):
    assert open_run(tmp_path) == tmp_path and open_run(str(tmp_path)) == tmp_path
    assert url_of(tmp_path) is None and where_of(tmp_path) == str(tmp_path)
    assert inside(tmp_path, "log") == f"{tmp_path}/log"
    assert claim(tmp_path) and not has_begun(tmp_path) and not has_events(tmp_path)
    share_files(tmp_path, "tokenizer.json")
    assert list(tmp_path.iterdir()) == []


def test_another_host_finds_what_the_driver_made(url, host, tmp_path):
    host("a")
    begin(url, tokenizer="words", problems="sums")
    host("b")
    there = open_run(url)
    assert tmp_path / "b" in there.parents and there.name == "demo"
    assert (url_of(there), where_of(there), inside(there, "log")) == (url, url, f"{url}/log")
    assert (there / "tokenizer.json").read_text() == "words"
    assert (there / "config.json").read_text() == "{}" and has_begun(there)
    (there / "report.html").write_text("all is well")
    assert put_beside(there, "report.html") == f"{url}/report.html"
    assert open_store(url).get("report.html") == b"all is well"


def test_a_run_is_made_once(url, host):
    host("a")
    begin(url)
    host("b")
    there = open_run(url)
    assert not claim(there)


def test_what_a_deleted_run_left_on_a_host_is_not_used(url, host):
    host("a")
    begin(url, tokenizer="old", problems="old")
    host("b")
    there = open_run(url)
    host("a")
    here = open_run(url)
    EventLog(here)
    WeightLog.open(inside(here, "log"), run_id="demo", create=True)
    open_store(url).put("rounds/outer.json", b"{}")
    delete_run(here)
    store = open_store(url)
    for folder in ("", "metrics/", "log/", "rounds/"):
        assert store.list(folder) == []
    host("b")
    assert open_run(url) == there and not (there / "config.json").exists()
    host("a")
    begin(url, tokenizer="new")
    host("b")
    assert (open_run(url) / "tokenizer.json").read_text() == "new"
    assert not (there / "problems.json").exists()


def test_a_file_that_was_changed_on_a_host_is_fetched_again(url, host):
    host("a")
    begin(url, tokenizer="words")
    host("b")
    (open_run(url) / "tokenizer.json").write_text("other words")
    assert (open_run(url) / "tokenizer.json").read_text() == "words"
    open_store(url).put("tokenizer.json", b"broken", overwrite=True)
    host("c")
    with pytest.raises(OSError, match=r"tokenizer.json is not what files.json says"):
        open_run(url)


def test_nothing_is_deleted_that_is_no_run(url, host):
    host("a")
    begin(url)
    open_store(url).put("other.txt", b"of somebody's")
    with pytest.raises(ValueError, match="no run of gossamer's to overwrite"):
        delete_run(open_run(url))
    assert open_store(url).get("other.txt") == b"of somebody's"


def test_events_of_a_run_at_a_url_are_in_its_store(url, host):
    host("a")
    begin(url)
    here = open_run(url)
    assert not has_events(here)
    events = EventLog(here)
    events.write("run_start", {"name": "demo"})
    events.flush()
    assert has_events(here) and not (here / "metrics.jsonl").exists()
    store = open_store(url)
    (name,) = store.list("metrics/")
    (segment,) = store.list(name.removesuffix(".json") + "/")
    assert json.loads(store.get(segment))["name"] == "demo"


def test_a_run_lives_and_is_deleted_in_a_bucket(host):
    server = S3Server()
    server.put("bucket")
    with s3_environment(server.port):
        host("a")
        begin("s3://bucket/runs/demo", tokenizer="words")
        begin("s3://bucket/runs/other", tokenizer="others")
        here = open_run("s3://bucket/runs/demo")
        events = EventLog(here)
        for number in range(3):
            events.write("train_step", {"step": number})
            events.flush()
        host("b")
        there = open_run("s3://bucket/runs/demo/")
        assert there != here and (there / "tokenizer.json").read_text() == "words"
        lines = StoreTail(where_of(there)).read()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
        assert not claim(there)
        delete_run(there)
        assert not has_begun(here) and not has_events(here)
        assert has_begun(open_run("s3://bucket/runs/other"))
        with pytest.raises(StoreError, match="there is no such bucket"):
            begin("s3://nowhere/demo")
    server.close()


@pytest.mark.parametrize("where", ["ftp://host/run", "ray://run", "s3://"])
def test_a_url_that_cannot_hold_a_run_is_refused(where):
    with pytest.raises(ValueError, match="expected a path, or a URL of file://, s3://"):
        open_run(where)


def test_a_place_that_is_not_there_is_told(tmp_path):
    url = (tmp_path / "run").as_uri()
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        open_run(url)
