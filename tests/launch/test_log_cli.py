"""`gossamer log`: what it prints and writes, on a real log in a folder."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from gossamer.comm.config import LogConfig
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.signing import Signer
from gossamer.comm.store import open_store
from gossamer.comm.subscriber import Subscriber
from gossamer.launch import meter
from gossamer.launch.cli import main

SHAPES = {
    **{f"model.layers.{layer}.mlp.up_proj.weight": (128, 96) for layer in range(2)},
    "model.norm.weight": (96,),
}
VERSIONS = 7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A signed log of seven versions, anchors at 0 and 5; its keys; the last state."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["log", "keygen", str(folder / "key")]) == 0
    log = WeightLog.open(folder / "log", run_id="seven", create=True)
    signer, config = Signer.from_file(folder / "key"), LogConfig(anchor_every_versions=5)
    publisher = Publisher(log, config=config, signer=signer)
    dice = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=dice) for name, shape in SHAPES.items()}
    for step in range(VERSIONS):
        for values in state.values():
            values += 2e-4 * torch.randn(values.shape, generator=dice)
        last = {name: values.bfloat16() for name, values in state.items()}
        publisher.publish(last, step=10 * step)
    return folder, last


def answer(capsys, *words, code=0):
    capsys.readouterr()
    assert main(["log", *map(str, words)]) == code
    return capsys.readouterr()


def refused(capsys, *words):
    said = answer(capsys, *words, code=1)
    assert said.out == "" and said.err.startswith("gossamer: ") and said.err.count("\n") == 1
    return said.err


def test_ls_has_a_line_for_each_version(made, capsys):
    lines = answer(capsys, "ls", made[0] / "log").out.splitlines()
    assert lines[0] == f"run seven at {made[0] / 'log'}"
    assert lines[1].split() == "version step epoch written changed delta anchor".split()
    assert len(lines) == 2 + VERSIONS
    first, last = lines[2].split(), lines[-1].split()
    assert first[:3] == ["0", "0", "1"] and first[5:7] == ["–", "–"] and first[-1] in ("kB", "MB")
    assert last[:3] == ["6", "60", "1"] and "%" in last and last[-1] == "–"
    listed = json.loads(answer(capsys, "ls", made[0] / "log", "--json").out)
    assert [row["version"] for row in listed["versions"]] == list(range(VERSIONS))
    assert [bool(row["anchor_bytes"]) for row in listed["versions"]] == [True] + [False] * 4 + [
        True,
        False,
    ]
    assert 0 < listed["versions"][3]["density"] < 1 and listed["folds"] == []


def test_inspect_shows_layers_codecs_and_steps(made, capsys):
    shown = answer(capsys, "inspect", made[0] / "log").out
    assert shown.startswith("version 6, delta, step 60: ") and "steps, in neighbouring" in shown
    assert "\nmodel.layers.0 " in shown and "\nmodel.layers.1 " in shown and "\nentropy" in shown
    assert "up_proj" not in shown
    assert (
        "\nmodel.layers.1.mlp.up_proj.weight "
        in answer(capsys, "inspect", made[0] / "log", "--tensors").out
    )
    assert answer(capsys, "inspect", made[0] / "log", 0).out.startswith("version 0, anchor, step 0")
    log = WeightLog.open(made[0] / "log")
    found = json.loads(answer(capsys, "inspect", made[0] / "log", 3, "--json").out)
    manifest = log.manifest(3)
    assert found["num_changed"] == manifest.num_changed
    assert found["num_changed"] == sum(each["coded"] for each in found["tensors"])
    assert found["frame_bytes"] == manifest.delta[0].nbytes
    coded = found["codecs"]["entropy"]["coded"]
    assert sum(found["steps"].values()) == pytest.approx(coded, rel=0.02)
    assert found["steps"]["+1"] + found["steps"]["-1"] > 0.5 * coded


def test_verify_says_what_is_wrong(made, tmp_path, capsys):
    folder, _ = made
    public = folder / "key.pub"
    said = answer(capsys, "verify", folder / "log", "--replay", "--public-key", public).out
    assert said.startswith("7 versions, 0 folds, ") and said.endswith(
        f": all sound, signed by {public}\n"
    )
    assert main(["log", "mirror", str(folder / "log"), str(tmp_path)]) == 0
    part = tmp_path / "parts/00000006-e0001-p0.delta"
    data = bytearray(part.read_bytes())
    data[-200] ^= 1
    part.write_bytes(data)
    said = answer(capsys, "verify", tmp_path, code=1)
    assert said.out.endswith(": 1 faults\n")
    assert said.err.startswith("gossamer: parts/00000006-e0001-p0.delta is not a sound frame")
    main(["log", "keygen", str(tmp_path / "other")])
    sentence = refused(capsys, "inspect", folder / "log", "--public-key", tmp_path / "other.pub")
    assert "manifest-00000006.json is forged: its signature is not by" in sentence


def test_mirror_fold_and_gc_keep_readers_right(made, tmp_path, capsys):
    folder, last = made
    copy, key = tmp_path / "copy", folder / "key"
    said = answer(capsys, "mirror", folder / "log", copy).out
    assert said.startswith("version 6 of 6, ") and said.endswith(" copied\n")
    live = LiveWeights({name: torch.zeros_like(values) for name, values in last.items()})
    reader = Subscriber(WeightLog.open(copy, public_key=folder / "key.pub"), live)
    assert reader.next_version() == 5  # a copy begins at the newest anchor
    said = answer(capsys, "fold", folder / "log", 1, 6, "--key", key).out
    assert said.startswith("fold-00000001-00000006.json: ") and said.endswith(" in 5 deltas\n")
    assert "fold from 1, " in answer(capsys, "ls", folder / "log").out
    assert "exists already" in refused(capsys, "fold", folder / "log", 1, 6)
    said = answer(capsys, "gc", copy, "--keep-versions", 1, "--keep-anchors", 1).out
    assert said.startswith("kept version 5 and later; deleted 0 manifests and 0 parts, 0 parts")
    assert reader.catch_up() == 6
    assert all(torch.equal(live.tensors[name], last[name]) for name in last)
    WeightLog.open(tmp_path / "empty", create=True)
    assert answer(capsys, "gc", tmp_path / "empty").out == "the log is empty\n"


def test_what_cannot_be_done_is_one_sentence(made, tmp_path, capsys):
    assert "no weight log at" in refused(capsys, "ls", tmp_path)
    assert "manifest-00000099.json is missing" in refused(capsys, "inspect", made[0] / "log", 99)
    assert "a fold spans at least two" in refused(capsys, "fold", made[0] / "log", 5, 6)
    assert "key.pub exists already" in refused(capsys, "keygen", made[0] / "key")
    assert "scheme 'ftp'" in refused(capsys, "ls", "ftp://nowhere/log")
    WeightLog.open(tmp_path / "empty", create=True)
    assert "is empty" in refused(capsys, "inspect", tmp_path / "empty")


SERVE = """
import sys
from gossamer.launch.cli import main
try:
    main(["log", "serve", *sys.argv[1:], "--port", "0"])
finally:
    loaded = {"torch", "ray", "transformers", "deepspeed", "omegaconf"} & set(sys.modules)
    print("loaded", sorted(loaded), flush=True)
"""


@contextmanager
def log_serve(*words):
    """`gossamer log serve WORDS` as a process, which does not outlive the block."""
    command = [sys.executable, "-c", SERVE, *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            yield server
        finally:
            server.kill()  # nothing happens to one that is over


def test_serve_offers_the_log_until_it_is_stopped(made, capsys):
    with log_serve(made[0] / "log") as server:
        said = server.stdout.readline()
        assert said.startswith("run seven at http://127.0.0.1:")
        assert answer(capsys, "ls", said.split()[-1], "--json").out.count('"anchor_bytes"') == 7
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=120)
    assert (out, err) == ("loaded []\n", "gossamer: stopped\n")


def test_a_folder_is_served_to_be_written_to_where_one_says_so(tmp_path):
    with log_serve(tmp_path / "rounds", "--writable") as server:
        said = server.stdout.readline()
        assert said.startswith(f"{tmp_path / 'rounds'} at http://127.0.0.1:")
        assert open_store(said.split()[-1]).put("outer.json", b"{}")
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=120)
    assert (out, err) == ("loaded []\n", "gossamer: stopped\n")
    assert (tmp_path / "rounds" / "outer.json").read_bytes() == b"{}"


def test_a_meter_speaks_up_after_a_second_and_in_lines_where_nobody_watches(capsys, monkeypatch):
    with meter.Meter("counting") as count:
        count(1, 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(meter, "QUIET_S", 0.0)
    monkeypatch.setattr(meter, "LINE_EVERY_S", 0.0)
    with meter.Meter("counting") as count:
        count(1, 3)
        count(3, 3)
    assert capsys.readouterr().err == "counting: 1 of 3\ncounting: 3 of 3\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with meter.Meter("counting") as count:
        count(2, 3)
        assert count._bar.tasks[0].completed == 2
