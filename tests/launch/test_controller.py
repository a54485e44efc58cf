"""What the controller refuses before anything is started."""

import fcntl
import os
from dataclasses import replace

import pytest
from checkpoint_rows import write_on_two_ranks
from gossamer.launch import controller
from gossamer.launch.config import RunConfig
from gossamer.launch.controller import RunError, newest_checkpoint, resume_run, start_run
from gossamer.launch.recipe import build_config, with_absolute_paths
from tiny_run import SETTINGS

CONFIG = build_config(RunConfig, {"name": "tiny", "train": SETTINGS}, "")
FINISHED = '{"event": "run_end", "time_s": 1.0, "reason": "finished"}\n'


def test_paths_of_a_recipe_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = {**SETTINGS, "model": {"path": "model"}, "data": {"corpus_path": "text.md"}}
    train = with_absolute_paths(build_config(RunConfig, {"name": "x", "train": train}, "")).train
    assert train.model.path == str(tmp_path / "model")
    assert train.data.corpus_path == str(tmp_path / "text.md")
    for given, url in (("saved", str(tmp_path / "saved")), ("s3://bucket/x", "s3://bucket/x")):
        train = build_config(
            RunConfig, {"name": "x", "train": {**SETTINGS, "checkpoint": {"url": given}}}, ""
        )
        assert with_absolute_paths(train).train.checkpoint.url == url
    assert with_absolute_paths(CONFIG) == CONFIG


def write_run(folder, metrics=FINISHED):
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(metrics)


def test_overwriting_deletes_runs_only(tmp_path):
    model = {"config.json": "{}", "model.safetensors": "weights"}
    for name, text in model.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match="no run of gossamer's to overwrite"):
        start_run(CONFIG, tmp_path, overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == model


def test_a_run_is_not_overwritten_unasked(tmp_path):
    write_run(tmp_path)
    with pytest.raises(RunError, match="already holds a run"):
        start_run(CONFIG, tmp_path, overwrite=False)
    assert (tmp_path / "metrics.jsonl").read_text() == FINISHED


def test_a_finished_run_is_not_resumed_even_when_its_last_line_is_torn(tmp_path):
    write_run(tmp_path, FINISHED + '{"event": "au')
    with pytest.raises(RunError, match="has finished"):
        resume_run(CONFIG, tmp_path)


def test_a_folder_has_one_driver_at_a_time(tmp_path):
    write_run(tmp_path)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    for go in (lambda: start_run(CONFIG, tmp_path, True), lambda: resume_run(CONFIG, tmp_path)):
        with pytest.raises(RunError, match="is being run by another gossamer process"):
            go()
    assert (tmp_path / "metrics.jsonl").read_text() == FINISHED
    os.close(other)
    with pytest.raises(RunError, match="has finished"):
        resume_run(CONFIG, tmp_path)


def test_a_new_run_does_not_go_on_from_anothers_checkpoints(tmp_path):
    place = tmp_path / "elsewhere"
    url = write_on_two_ranks(place)
    checkpoint = replace(CONFIG.train.checkpoint, url=str(place))
    config = replace(CONFIG, train=replace(CONFIG.train, checkpoint=checkpoint))
    with pytest.raises(RunError, match="elsewhere holds another run's checkpoints"):
        start_run(config, tmp_path / "run", overwrite=False)
    assert newest_checkpoint(tmp_path / "run", str(place)) == url
    assert newest_checkpoint(tmp_path / "run") is None
    controller._clear_checkpoints(config, tmp_path / "run", overwrite=True)
    assert newest_checkpoint(tmp_path / "run", str(place)) is None
