import json

import pytest
import wandb
from gossamer.trainer.config import MetricsConfig
from gossamer.trainer.metrics import METRICS_FILE, EventLog, WandbMirror, drop_torn_lines
from gossamer.trainer.run_folder import open_run

WHOLE = [b'{"event": "a", "time_s": 1.0}\n', b'{"event": "b", "time_s": 2.0}\n']


@pytest.mark.parametrize(
    ("held", "kept"),
    [
        (b"", b""),
        (b"".join(WHOLE), b"".join(WHOLE)),
        (WHOLE[0] + WHOLE[1][:9], WHOLE[0]),
        (WHOLE[0] + WHOLE[1][:-1], WHOLE[0]),
        (WHOLE[0][:9] + WHOLE[0] + WHOLE[1], WHOLE[1]),  # another process wrote on
        (WHOLE[0] + b"\xff\0\n7\n" + WHOLE[1], b"".join(WHOLE)),
    ],
)
def test_after_torn_lines_go_an_event_begins_on_a_line_of_its_own(tmp_path, held, kept):
    path = tmp_path / METRICS_FILE
    path.write_bytes(held)
    drop_torn_lines(tmp_path)
    assert path.read_bytes() == kept
    EventLog(tmp_path).write("c", {"x": 1})
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:-1]) == kept and json.loads(lines[-1])["x"] == 1


def test_after_a_torn_line_others_lose_nothing(tmp_path):
    path, log = tmp_path / METRICS_FILE, EventLog(tmp_path)
    path.write_bytes(WHOLE[0] + WHOLE[1][:9])  # a full disk, under a process that goes on
    log.write("c", {"x": 1})
    log.write("c", {"x": 2})
    drop_torn_lines(tmp_path)
    first, *others = map(json.loads, path.read_bytes().splitlines())
    assert first == json.loads(WHOLE[0]) and [other["x"] for other in others] == [1, 2]


def test_a_run_without_metrics_has_no_torn_lines(tmp_path):
    drop_torn_lines(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left.*{METRICS_FILE}"):
        EventLog(tmp_path).write("a", {})


@pytest.mark.parametrize("is_url", [False, True])
def test_attempts_go_on_with_one_wandb_run(tmp_path, monkeypatch, is_url):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    begun = []
    monkeypatch.setattr(wandb, "init", lambda **told: begun.append((told["id"], told["resume"])))
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        run_dir = open_run((tmp_path / name).as_uri() if is_url else tmp_path / name)
        WandbMirror(run_dir, "run", MetricsConfig(wandb_mode="offline"), {})
    assert begun[0] == begun[1] != begun[2] and {resume for _, resume in begun} == {"allow"}
