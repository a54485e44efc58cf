"""Replicas of a run: what is refused, who is started again, who may join."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from gossamer.comm.store import open_store
from gossamer.launch import replicas, replicas_process
from gossamer.launch.cli import main
from gossamer.launch.config import FleetConfig, RecoveryConfig, RunConfig
from gossamer.launch.controller import RunError, start_run
from gossamer.launch.lifecycle import Event
from gossamer.launch.recipe import build_config, dump_config, load_recipe
from gossamer.launch.replicas import resume_replicas, start_replicas
from gossamer.launch.replicas_display import FleetDisplay
from gossamer.launch.replicas_members import (
    enlist,
    joining,
    leave_recipe,
    open_rounds,
    prepare_member,
    readers,
)
from gossamer.launch.replicas_process import Member
from gossamer.trainer.metrics import EventLog
from rich.console import Console
from tiny_run import SETTINGS, events

OUTER = {"inner_steps": 2, "quorum": 2}
TRAIN = {**SETTINGS, "phases": SETTINGS["phases"][:1], "outer": OUTER}


def config_of(replicas=3, fleet=None, **changes):
    values = {"name": "tiny", "replicas": replicas, "fleet": fleet or {}}
    return build_config(RunConfig, values | {"train": {**TRAIN, **changes}}, "")


def member_of(config, index, **outer):
    """The config of one of a run's replicas, as the supervisor tells it."""
    train = config.train
    told = replace(train.outer, replica=f"replica-{index}", **outer)
    data = replace(train.data, replica_index=index, num_replicas=8)
    return replace(config, replicas=1, train=replace(train, outer=told, data=data))


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"outer": None}, "replicas is 3; expected 1, or a train.outer section"),
        ({"data": {"num_replicas": 2}}, "train.data.num_replicas is 2; expected 1 or at least"),
        (
            {"data": {"num_replicas": 5}, "outer": {"exchange": "collective"}},
            "train.data.num_replicas is 5; expected replicas=3 with train.outer.exchange coll",
        ),
        ({"replicas": 0}, "replicas is 0; expected at least 1"),
        ({"fleet": {"link_mbit": 0}}, "fleet.link_mbit is 0.0; expected a positive number"),
        (
            {"fleet": {"link_mbit": 9}, "outer": {"url": "s3://b/rounds"}},
            "fleet.link_mbit needs rounds in the run's own folder",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config_of(**changes)


def test_each_replica_has_a_share_of_the_data_and_all_are_waited_for(tmp_path):
    config = replicas_process.for_all(config_of(checkpoint={"url": "s3://b/saved"}))
    assert (config.train.data.num_replicas, config.train.outer.expected_replicas) == (3, 3)
    member = replicas_process.member_of(tmp_path, 2, "1.2.3.4:5", "http://127.0.0.1:6", [])
    path = tmp_path / "config.json"
    dump_config(config, path)
    told = [*replicas_process._own_overrides(config, member), *member.overrides]
    own = load_recipe(str(path), told)
    assert own.replicas == 1 and own.cluster.address == "1.2.3.4:5"
    assert own.train.outer == replace(
        config.train.outer, replica="replica-2", url="http://127.0.0.1:6"
    )
    assert own.train.data == replace(config.train.data, replica_index=2)
    assert own.train.checkpoint.url == "s3://b/saved/replica-2"


def test_a_resumed_run_may_be_told_where_it_runs_and_no_more(tmp_path, capsys):
    assert main(["resume", str(tmp_path), "train.seed=2"]) == 1
    assert "may be told where it runs, and no more" in capsys.readouterr().err
    assert main(["resume", str(tmp_path), "cluster.address=auto"]) == 1
    assert "config.json is missing" in capsys.readouterr().err


# --- who takes part -----------------------------------------------------------------------------


def test_what_the_first_prepared_is_what_all_have(tmp_path):
    config, first, second = config_of(), tmp_path / "first", tmp_path / "second"
    shared = {"url": str(tmp_path / "rounds")}
    for index, folder in enumerate((first, second)):
        folder.mkdir()
        prepare_member(member_of(config, index, **shared), folder)
        if folder == first:  # one that is made from other text, as on another Python
            path = tmp_path / "rounds/recipe/tokenizer.json"
            path.write_text(path.read_text() + " ")
    assert (second / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text() + " "
    assert (second / "problems.json").read_bytes() == (first / "problems.json").read_bytes()
    assert readers(open_store(shared["url"])) == {0: "replica-0", 1: "replica-1"}


def test_no_two_read_one_share_of_the_data(tmp_path):
    config = config_of()
    store = open_store(tmp_path)
    enlist(store, member_of(config, 1))
    enlist(store, member_of(config, 1))  # it comes back
    other = member_of(config, 1)
    other = replace(
        other, train=replace(other.train, outer=replace(other.train.outer, replica="oslo"))
    )
    with pytest.raises(ValueError, match="replica_index is 1, but replica-1 reads that share"):
        enlist(store, other)


def test_one_that_joins_gets_the_recipe_and_a_share_of_its_own(tmp_path):
    config, log = config_of(data={**SETTINGS["data"], "num_replicas": 5}), str(tmp_path / "rounds")
    store = open_store(log, create=True)
    leave_recipe(store, config, tmp_path)
    for index in range(3):
        enlist(store, member_of(config, index))
    joined, name, returns = joining(log, ["train.parallel.expert=1"], None)
    assert (
        not returns
        and name == "replica-3"
        and (joined.replicas, joined.fleet) == (1, FleetConfig())
    )
    assert (joined.train.outer.url, joined.train.outer.replica) == (log, "replica-3")
    assert (joined.train.data.replica_index, joined.train.parallel.expert) == (3, 1)
    assert joined.train.phases == config.train.phases
    with pytest.raises(ValueError, match="train.nothing"):
        joining(log, ["train.nothing=1"], None)  # and takes no share
    assert joining(log, [], "oslo")[0].train.data.replica_index == 4
    with pytest.raises(ValueError, match="all 5 shares .* replica-0, .* oslo; expected --name"):
        joining(log, [], None)
    back, name, returns = joining(log, [], "replica-1")
    assert returns and name == "replica-1" and back.train.data.replica_index == 1
    with pytest.raises(
        FileNotFoundError, match=r"has no recipe.json; expected the rounds of a run"
    ):
        joining(str(tmp_path), [], None)


def test_a_log_of_rounds_that_is_anothers_is_not_taken(tmp_path):
    url, config = str(tmp_path / "elsewhere"), config_of()
    config = replace(
        config, train=replace(config.train, outer=replace(config.train.outer, url=url))
    )
    leave_recipe(open_rounds(config, tmp_path), config, tmp_path)
    with pytest.raises(RunError, match=f"{url} holds another run's rounds: .*`gossamer join {url}"):
        start_replicas(config, tmp_path / "run", overwrite=False)
    (tmp_path / "run" / "config.json").write_text("{}")
    for start in (start_replicas, start_run):
        with pytest.raises(RunError, match="already holds a run"):
            start(config, tmp_path / "run", False)


# --- who is started again -----------------------------------------------------------------------


class Scripted(Member):
    """A member whose process runs one line of Python after the other, a start each."""

    scripts = ()

    def start(self, config, recipe):
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        scripts = self.scripts[self.index]
        script = scripts[min(len(self.failures), len(scripts) - 1)]
        with (self.run_dir / "logs" / "console.log").open("a") as console:
            self.process = subprocess.Popen([sys.executable, "-c", script], stderr=console)
        self.enter(Event.START, Event.READY)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(replicas, "REFRESH_S", 0.01)


FINE, DIES = "pass", "import os; os.kill(os.getpid(), 9)"


def watch(run_dir, scripts, max_failures=2):
    Scripted.scripts = scripts
    members = [
        Scripted(f"replica-{i}", i, run_dir / f"replica-{i}", [], []) for i in range(len(scripts))
    ]
    console = Console(file=io.StringIO())
    display = FleetDisplay(run_dir, members, None, "", "", console)
    recovery = RecoveryConfig(max_failures=max_failures, pause_s=0.0)
    config = replace(config_of(), recovery=recovery)
    replicas._watch(config, run_dir, members, EventLog(run_dir), display)
    display.stop()
    told = [(e["replica"], e["what"]) for e in events(run_dir, "replica") if e["what"] != "started"]
    return members, told, console.file.getvalue()


def test_one_that_dies_is_started_again_and_the_others_do_not_notice(tmp_path, quick):
    members, told, printed = watch(tmp_path, [[FINE], [DIES, DIES, FINE]])
    assert [member.state for member in members] == ["finished", "finished"]
    mine = [what for name, what in told if name == "replica-1"]
    assert mine == ["died", "restarted", "died", "restarted", "finished"]
    assert ("replica-0", "died") not in told
    assert "replica-1 died: its process was killed by SIGKILL" in printed


def test_one_that_goes_on_dying_is_given_up(tmp_path, quick):
    fails = "import sys; sys.exit('gossamer: no bread today')"
    members, told, printed = watch(tmp_path, [[fails], [FINE]], max_failures=2)
    assert [member.state for member in members] == ["lost", "finished"]
    assert [what for name, what in told if name == "replica-0"].count("restarted") == 2
    assert "replica-0 given up: no bread today" in printed


def test_one_that_another_process_took_over_is_left_to_it(tmp_path, quick):
    taken = "import sys; sys.exit('gossamer: replica replica-0 was taken over by a newer process')"
    members, told, _ = watch(tmp_path, [[taken]])
    assert members[0].state == "lost" and told == [("replica-0", "taken over")]


def test_one_that_finished_before_is_not_run_again(tmp_path):
    config = config_of(replicas=2)
    for index, reason in enumerate(("finished", "a rank died")):
        EventLog(tmp_path / f"replica-{index}").write("run_end", {"reason": reason})
    states = [replicas_process.member_of(tmp_path, i, None, "u", []).state for i in range(3)]
    assert states == ["finished", "waiting", "waiting"]
    EventLog(tmp_path / "replica-1").write("run_end", {"reason": "finished"})
    with pytest.raises(RunError, match=f"{tmp_path} has finished; see `gossamer report"):
        resume_replicas(config, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_replicas_stop_with_a_supervisor_that_is_killed(tmp_path):
    child = (
        f"import pathlib, time; p = pathlib.Path({str(tmp_path / 'said')!r})\n"
        "try:\n    p.write_text('runs'); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    p.write_text('stopped')"
    )
    parent = (
        "import subprocess, sys, time\n"
        "from gossamer.launch.replicas_process import _stop_with_parent\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=_stop_with_parent)\n"
        "time.sleep(60)"
    )
    started = subprocess.Popen([sys.executable, "-c", parent])
    wait_for(tmp_path / "said", "runs")
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    wait_for(tmp_path / "said", "stopped")


def wait_for(path: Path, text: str) -> None:
    deadline_s = time.monotonic() + 30
    while not path.exists() or path.read_text() != text:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_the_shipped_recipe_leaves_room_for_some_that_join():
    config = load_recipe("replicas_laptop", [])
    assert (config.replicas, config.fleet.link_mbit) == (4, 100.0)
    assert config.train.data.num_replicas == 8


def test_resume_of_a_folder_that_another_drives_is_refused(tmp_path):
    import fcntl

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="is being run by another gossamer process"):
        resume_replicas(config_of(), tmp_path)
    os.close(descriptor)
