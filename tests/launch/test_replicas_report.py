"""Summary, display and report of several replicas, from rounds and events as they are written."""

import io
import json
from types import SimpleNamespace

import pytest
from gossamer.comm.manifest import PartRef
from gossamer.comm.outer.record import Counted, Record, pack_record, record_name
from gossamer.comm.store import open_store
from gossamer.launch.cli import main
from gossamer.launch.replicas_charts import membership_chart
from gossamer.launch.replicas_display import FleetDisplay
from gossamer.launch.replicas_summary import is_fleet, read_fleet, summarise_fleet
from gossamer.launch.report import write_report
from gossamer.trainer.metrics import EventLog
from rich.console import Console
from test_replicas import TRAIN

PARAMS, FRAME = 250_000, 10_000
# (round, who counted in time, who counted late, who was refused)
ROUNDS = [
    (0, ["replica-0", "replica-1"], [], []),
    (1, ["replica-0"], [], ["replica-1"]),
    (2, ["replica-0", "oslo"], ["replica-1"], []),
]


def counted(name, number):
    parts = [PartRef(f"rounds/{number:08d}/{name}", FRAME, "0" * 64)]
    return Counted(
        replica=name, incarnation=1, round=number, tokens_before=0, tokens=90, parts=parts
    )


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    fleet = EventLog(folder)
    config = {"name": "fleet", "replicas": 2, "train": TRAIN}
    (folder / "config.json").write_text(json.dumps(config))
    fleet.write("fleet_start", {"name": "fleet", "replicas": 2})
    store = open_store(folder / "rounds", create=True)
    for number, names, late, refused in ROUNDS:
        entries = [counted(name, number) for name in names]
        entries += [counted(name, number - 1) for name in late]
        record = Record(
            run_id="fleet",
            round=number,
            parent_hash=None,
            base_hash="0" * 16,
            counted=entries,
            refused={name: "its message is not finite" for name in refused},
            books={name: 90 * (number + 1) for name in names},
            written_by="replica-0",
            created_s=1.0,
        )
        store.put(record_name(number), pack_record(record))
    for index in range(2):
        write_replica(folder / f"replica-{index}", fleet, index)
    fleet.write("run_end", {"reason": "finished"})
    return folder


def write_replica(folder, fleet, index):
    name, log = folder.name, EventLog(folder)
    fleet.write("replica", {"replica": name, "what": "started"})
    log.write("run_start", {"name": "fleet", "seed": 1, "params": PARAMS})
    for step in range(1, 7):
        fields = {"phase": "warm_start", "step": step, "phase_step": step, "loss": 7 - step}
        log.write("train_step", fields | {"tokens": 30, "step_s": 0.1, "tokens_per_s": 300.0})
        if step % 2 == 0:
            log.write("outer_round", outer_round(step // 2 - 1, step))
    if index:
        fleet.write("replica", {"replica": name, "what": "died", "reason": "it <was> killed"})
        fleet.write("replica", {"replica": name, "what": "restarted"})
        log.write("run_start", {"name": "fleet", "seed": 1, "params": PARAMS})
    log.write("run_end", {"reason": "finished"})
    fleet.write("replica", {"replica": name, "what": "finished"})


def outer_round(number, step):
    costs = {"compute_s": 3.0, "send_s": 0.1, "wait_s": 0.8, "apply_s": 0.1, "utilisation": 0.75}
    sizes = {"wire_bytes_sent": FRAME, "wire_bytes_read": 2 * FRAME}
    return {
        "round": number,
        "step": step,
        "tokens": 90,
        "state_hash": f"{number:016x}",
        **costs,
        **sizes,
    }


def fleet_of(run_dir):
    return read_fleet(run_dir, open_store(run_dir / "rounds"))


def test_the_summary_counts_messages_by_the_records(run_dir):
    found = summarise_fleet(fleet_of(run_dir), run_dir)
    assert (found["rounds"], found["late"], found["refused"]) == (3, 1, 1)
    assert found["joined"] == ["oslo"] and found["tokens"] == 2 * 270
    assert found["wire_bytes"] == 6 * FRAME and found["dense_bytes"] == 6 * 4 * PARAMS
    assert found["hashes_equal"] is True and found["utilisation"] == pytest.approx(0.75)
    second = found["replicas"]["replica-1"]
    assert (second["state"], second["restarts"], second["rounds"]) == ("finished", 1, 2)
    assert second["steps"] == 6 and second["state_hash"] == f"{2:016x}"


def test_without_a_store_the_replicas_themselves_tell(run_dir):
    found = summarise_fleet(read_fleet(run_dir, None), run_dir)
    assert (found["rounds"], found["tokens"], found["wire_bytes"]) == (3, 540, 6 * FRAME)
    assert found["replicas"]["replica-0"]["rounds"] == 3 and found["hashes_equal"] is True


def test_one_replica_that_strays_is_told(run_dir):
    strayed = outer_round(2, 6) | {"state_hash": "f" * 16}
    EventLog(run_dir / "replica-1").write("outer_round", strayed)
    assert summarise_fleet(fleet_of(run_dir), run_dir)["hashes_equal"] is False


def test_who_counted_is_a_row_each(run_dir):
    heat = membership_chart(fleet_of(run_dir)).figure.data[0]
    assert list(heat.y) == ["oslo", "replica-0", "replica-1"]
    fates = dict(zip(heat.y, heat.text, strict=True))
    assert list(fates["oslo"]) == ["absent", "absent", "counted"]
    # made in round 1, where it was refused; round 2 counted it
    assert list(fates["replica-1"]) == ["counted", "late", "absent"]


def test_the_report_is_one_file_and_safe(run_dir, capsys):
    assert is_fleet(run_dir) and main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    page = (run_dir / "report.html").read_text()
    assert "Who counted" in page and "oslo joined from elsewhere" in page and "bit-exact" in page
    assert "default-src 'none'" in page and "<was>" not in page
    assert json.loads((run_dir / "summary.json").read_text())["rounds"] == 3
    one = write_report(run_dir / "replica-0").read_text()
    assert "3 rounds with other replicas: 30 kB sent" in one


def test_a_fleet_that_was_killed_early_has_a_report_too(run_dir):
    for name in ("replica-0", "replica-1"):
        (run_dir / name / "metrics.jsonl").write_text("")
    for path in (run_dir / "rounds").iterdir():
        path.unlink()
    assert main(["report", str(run_dir)]) == 0
    found = json.loads((run_dir / "summary.json").read_text())
    assert found["hashes_equal"] is None and found["rounds"] == 0


def shown(run_dir, width=110, terminal=False):
    state = {"state": "running", "restarts": 0, "started_s": 1.0}
    members = [
        SimpleNamespace(name=f"replica-{i}", run_dir=run_dir / f"replica-{i}", **state)
        for i in range(3)
    ]
    members[1].state, members[1].restarts = "waiting", 1
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    display = FleetDisplay(
        run_dir, members, open_store(run_dir / "rounds"), "s3://b/rounds", "9 Mbit/s", console
    )
    display.start()
    display.stop()
    return console.file.getvalue()


def test_plain_lines_tell_all_replicas_and_the_last_round(run_dir):
    printed = shown(run_dir)
    assert "one more replica: gossamer join s3://b/rounds" in printed
    assert "replica-1 died: it <was> killed" in printed
    last = printed.splitlines()[-1]
    assert "round 2: replica-0, oslo, replica-1 (late)" in last
    assert "replica-0 step 6 loss 1" in last
    assert "replica-1 died" in last and "replica-2 starting" in last


def test_the_panel_has_a_row_each(run_dir):
    printed = shown(run_dir, terminal=True)
    for words in ("replica-0", "died", "starting", "30 kB", "75 %", "9 Mbit/s", "round 2: "):
        assert words in printed
