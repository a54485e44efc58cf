"""`gossamer engines`: what it shows of a run's events, what it writes into its folder."""

import json

import pytest
from gossamer.launch import controller
from gossamer.launch.cli import main
from gossamer.launch.pool_wishes import WISHES_FILE
from gossamer.launch.recipe import dump_config, load_recipe
from synthetic_run import SyntheticRun

URL = "http://gpu7:8000"


@pytest.fixture
def run(tmp_path):
    config = load_recipe("demo", ["rollout.engines=2"])
    dump_config(config, tmp_path / "config.json")
    return SyntheticRun(tmp_path)


def told(run, engine, what, state, place=0, version=None, **fields):
    named = {"engine": engine, "what": what, "version": version}
    run.add("engine", **named, pool="engine", place=place, state=state, **fields)


def shown(capsys, *words):
    assert main(["engines", *map(str, words)]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_places_with_their_engines_states_and_versions(run, tmp_path, capsys):
    run.add("pools", pools=["engine"])
    told(run, "engine-7", "start", "starting", place=3)
    run.add("pools", pools=["engine"])  # a resume: what was before is gone
    for place in (0, 1, 2):
        told(run, f"engine-{place}", "start", "starting", place)
        told(run, f"engine-{place}", "ready", "running", place, version=4)
    run.publish(1)
    run.commit("engine-0")
    told(run, "engine-1", "dead", "waiting", 1, reason="killed")
    told(run, "engine-2", "left", "stopped", 2)
    told(run, "engine-3", "waits", "waiting", 4, waits_for="1 CPU")
    rows = shown(capsys, tmp_path)
    assert rows[1:] == [
        ["engine", "engine-0", "running", "v0"],
        ["engine", "engine-1", "waiting", "v4", "killed"],
        ["engine", "engine-3", "waiting", "waits", "for", "1", "CPU"],
        ["engine:", "2", "wanted"],
    ]
    told(run, "engine-4", "replaced", "starting", 1)
    assert shown(capsys, tmp_path)[2] == ["engine", "engine-4", "starting"]
    run.add("run_end", reason="stopped by its user")
    assert shown(capsys, tmp_path)[-1][:5] == ["the", "run", "has", "ended:", "stopped"]


def test_a_wish_is_written_for_the_pool_to_find(run, tmp_path, capsys):
    run.add("pools", pools=["engine"])
    assert shown(capsys, tmp_path, "engine=3", f"engine+={URL}/")[-1] == [
        "engine:", "3", "wanted", "and", URL,
    ]  # fmt: skip
    asked = json.loads((tmp_path / WISHES_FILE).read_text())["pools"]
    assert asked == {"engine": {"engines": 3, "urls": [URL]}}
    for word, sentence in (("engine=0", ""), ("engin=2", "POOL one of engine"), ("engine=-1", "")):
        words = [str(tmp_path), word] + ([f"engine-={URL}"] if word == "engine=0" else [])
        assert main(["engines", *words]) == 1
        assert sentence in capsys.readouterr().err
    assert json.loads((tmp_path / WISHES_FILE).read_text())["pools"] == asked


def test_what_has_no_engines_is_refused(tmp_path, capsys):
    assert main(["engines", str(tmp_path)]) == 1
    assert "expected the folder of a run" in capsys.readouterr().err
    dump_config(load_recipe("pretrain_stdlib", []), tmp_path / "config.json")
    assert main(["engines", str(tmp_path)]) == 1
    assert "expected a run with a grpo phase" in capsys.readouterr().err


def test_what_a_resume_is_told_of_engines_is_what_is_wanted_from_then_on(
    run, tmp_path, capsys, monkeypatch
):
    run.add("pools", pools=["engine"])
    went_on = []
    monkeypatch.setattr(
        controller, "_attempt", lambda config, *_, **__: went_on.append(config.rollout)
    )
    pools = "rollout.pools=[{name: near, engines: 4}, {name: far, engines: 1}]"
    shown(capsys, tmp_path, "engine=3")
    assert main(["resume", str(tmp_path)]) == 0
    assert shown(capsys, tmp_path)[-1] == ["engine:", "3", "wanted"]  # a wish outlives the driver
    assert main(["resume", str(tmp_path), "rollout.engines=4"]) == 0
    assert shown(capsys, tmp_path)[-1] == ["engine:", "4", "wanted"]
    assert shown(capsys, tmp_path, f"engine+={URL}")[-1] == ["engine:", "4", "wanted", "and", URL]
    assert main(["resume", str(tmp_path), pools]) == 0
    assert shown(capsys, tmp_path, "far=2")[-2:] == [
        ["near:", "4", "wanted"],
        ["far:", "2", "wanted"],
    ]
    assert main(["resume", str(tmp_path), "cluster.cpus_per_rank=2"]) == 0
    assert [len(rollout.pools) for rollout in went_on] == [0, 0, 2, 2]
    assert load_recipe(str(tmp_path / "config.json"), []).cluster.cpus_per_rank == 1
    assert shown(capsys, tmp_path)[-1] == ["far:", "2", "wanted"]
