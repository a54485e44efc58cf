"""Commands on a run whose folder is a URL: read from anywhere, refused where they must be."""

import json
import urllib.request
from pathlib import Path

import pytest
from gossamer.comm.log import WeightLog
from gossamer.comm.store import open_store
from gossamer.launch import submit
from gossamer.launch.cli import main
from gossamer.launch.config import RunConfig
from gossamer.launch.controller import RunError, make_room, resume_run, start_run
from gossamer.launch.display import EventTail
from gossamer.launch.prometheus import MetricsServer
from gossamer.launch.recipe import build_config, dump_config, load_recipe
from gossamer.launch.summary import read_events, summarise
from gossamer.trainer import run_folder
from gossamer.trainer.event_store import StoreLines
from gossamer.trainer.metrics import EventLog
from gossamer.trainer.run_folder import claim, inside, open_run, url_of
from synthetic_run import write_run
from test_submit_words import FakeHead
from tiny_run import SETTINGS

CONFIG = build_config(RunConfig, {"name": "tiny", "train": SETTINGS}, "")


@pytest.fixture
def url(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv(run_folder.CACHE_VARIABLE, str(tmp_path / "cache"))
    return (tmp_path / "bucket" / "demo").as_uri()


@pytest.fixture
def run(url, tmp_path) -> Path:
    """This host's folder of a synthetic run, whose lines two writers put by turns."""
    run_dir = open_run(url, create=True)
    dump_config(CONFIG, run_dir / "config.json")
    assert claim(run_dir)
    write_run(tmp_path / "plain")
    writers = [StoreLines(url), StoreLines(url)]
    for line in (tmp_path / "plain" / "metrics.jsonl").read_bytes().splitlines(keepends=True):
        writers[b'"engine"' in line].add(line)
    for writer in writers:
        writer.flush()
    return run_dir


def test_its_summary_is_that_of_a_plain_folder(run, tmp_path):
    assert summarise(run) == summarise(tmp_path / "plain")


def test_commands_read_it_from_a_host_that_never_saw_it(run, url, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(run_folder.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    assert main(["top", url, "--once"]) == 0
    assert "rl-sums" in capsys.readouterr().out
    assert main(["report", url]) == 0
    assert f"{url}/report.html" in capsys.readouterr().out
    store = open_store(url)
    assert json.loads(store.get("summary.json"))["name"] == "rl-sums"
    assert b"rl-sums" in store.get("report.html")
    server = MetricsServer(open_run(url), "127.0.0.1", 0)
    with urllib.request.urlopen(server.url, timeout=10) as answer:
        assert 'run="demo"' in answer.read().decode()
    server.close()


def test_a_display_is_told_of_new_lines(run, url):
    tail = EventTail(run)
    assert len(tail.read()) == len(read_events(run))
    events = EventLog(run)
    events.write("phase", {"phase": "rl"})
    events.flush()
    assert [event["event"] for event in tail.read(to_end=True)] == ["phase"]


def test_a_run_there_is_not_overwritten_unasked_and_only_as_a_run(run, url):
    with pytest.raises(RunError, match=f"^{url} already holds a run: continue it with `goss"):
        start_run(CONFIG, run, overwrite=False)
    WeightLog.open(inside(run, "log"), run_id="tiny", create=True)
    (run / "problems.json").write_text("of the run that is overwritten")
    make_room(run, overwrite=True)
    store = open_store(url)
    assert [store.list(folder) for folder in ("", "metrics/", "log/")] == [[], [], []]
    assert [path.name for path in run.iterdir()] == [".run_url"] and url_of(run) == url
    store.put("config.json", b"{}")
    with pytest.raises(ValueError, match="no run of gossamer's to overwrite"):
        make_room(run, overwrite=True)


def test_one_whose_driver_died_before_it_said_anything_has_no_events(url):
    EventLog(open_run(url, create=True))
    assert read_events(open_run(url)) == []


def test_one_that_finished_is_not_resumed(run, url):
    events = EventLog(run)
    events.write("run_end", {"reason": "finished"})
    events.flush()
    with pytest.raises(RunError, match=f"^{url} has finished; see `gossamer report {url}`"):
        resume_run(CONFIG, run)


@pytest.mark.parametrize("command", [["resume"], ["report"], ["top"], ["export", "--step", "1"]])
def test_where_there_is_no_run_a_sentence_says_so(url, tmp_path, command, capsys):
    words = [command[0], url, *([str(tmp_path / "out")] * (command[0] == "export")), *command[1:]]
    assert main(words) == 1
    assert "is not a directory" in capsys.readouterr().err
    open_store(url, create=True)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"gossamer: {url}" in said and "expected the folder of a" in said


def test_several_replicas_of_one_command_share_a_folder(url, capsys):
    assert main(["train", "replicas_laptop", "--run-dir", url]) == 1
    assert "replicas is 4 and --run-dir a URL" in capsys.readouterr().err


def test_a_secret_in_the_url_is_refused_and_not_repeated(capsys):
    for command in (["rl", "demo", "--run-dir"], ["report"], ["submit", "demo", "--run-dir"]):
        assert main([*command, "https://me:hunter2@host/run"]) == 1
        said = capsys.readouterr().err
        assert "holds a secret" in said and "hunter2" not in said


def test_a_submitted_run_may_be_at_a_url(monkeypatch, tmp_path):
    head = FakeHead()
    monkeypatch.setattr(submit, "_client", lambda address: head)
    assert main(["submit", "demo", "--run-dir", "s3://bucket/my run"]) == 0
    assert main(["submit", "--resume", "s3://bucket/demo", "rollout.engines=4"]) == 0
    words = [job["entrypoint"].partition("gossamer.launch.cli ")[2] for job in head.sent]
    assert words == [
        "rl recipe.json --run-dir 's3://bucket/my run'",
        "resume s3://bucket/demo rollout.engines=4",
    ]
    (tmp_path / "recipe.json").write_text(head.sent[0]["files"]["recipe.json"])
    assert load_recipe(str(tmp_path / "recipe.json"), []) == load_recipe("demo", [])
