"""`gossamer bench rl`: numbers worked out by hand from events, and the whole thing once."""

import json

import pytest
from gossamer.launch.bench.rl import RL, changed, measured
from gossamer.launch.bench.rl_table import render_table
from gossamer.launch.cli import main

SIZE = RL["prompts_per_step"] * RL["samples_per_prompt"]


def a_run() -> list[dict]:
    """Six steps of 2 s, of which 0.5 s waiting; every version is used 0.3 s after its step."""
    told = []
    for version in range(7):
        end_s = 100.0 + 2 * version
        told += [
            {"event": "train_step", "step_s": 2.0, "wait_s": 0.5, "staleness_mean": 1.0}
            for _ in range(version > 0)
        ]
        told += [
            {"event": "publish", "version": version, "time_s": end_s + 0.1, "publish_s": 0.1},
            {"event": "engine", "what": "commit", "version": version, "pause_s": 0.002},
            {"event": "first_token", "version": version, "time_s": end_s + 0.3},
        ]
    told[1]["pause_s"] = told[2]["time_s"] = 1e9  # the anchor counts nowhere
    return told


def test_columns_by_hand():
    row = measured(a_run())
    assert row["steps"] == 4
    assert row["samples_per_s"] == pytest.approx(SIZE / 2)
    assert row["trainer_idle"] == pytest.approx(0.25)
    assert row["step_to_token_s"] == pytest.approx(0.3)
    assert row["step_to_token_p90_s"] == pytest.approx(0.3)
    assert row["pause_s"] == 0.002 and row["staleness_mean"] == 1.0


def test_sparsity_by_hand():
    shares = {"seen_share": 0.9, "ever_share": 0.5, "net_share": 0.4}
    events = [
        {
            "event": "change",
            "step": step,
            "since_step": 0,
            "changed_share": changed_share,
            "kept_share": changed_share,
            **shares,
            "groups": ["0/expert 0", "0/expert 1", "0/attention"],
            "elements": [100, 100, 100],
            "net": [10, 30, 90],
        }
        for step, changed_share in ((1, 0.9), (2, 0.2), (3, 0.4))
    ]
    row = changed(events)
    assert row["changed_share"] == pytest.approx(0.3) and row["net_share"] == 0.4
    assert (row["expert_net_min"], row["expert_net_max"], row["steps"]) == (0.1, 0.3, 3)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three runs, each with a Ray cluster of its own
def test_quick_rows_and_their_table(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["bench", "rl", "--quick", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(r["mode"], r["engines"]) for r in result["rows"]] == [
        ("synchronous", 1),
        ("asynchronous", 1),
    ]
    for row in result["rows"]:
        assert row["samples_per_s"] > 0 and 0 <= row["trainer_idle"] <= 1
        assert 0 < row["pause_s"] < row["step_to_token_s"] <= row["step_to_token_p90_s"]
    synchronous, asynchronous = result["rows"]
    # a version may come while a batch is in the making: its later tokens are of that one
    assert synchronous["staleness_mean"] == 0 < asynchronous["staleness_mean"] <= 1
    (sparsity,) = result["sparsity"]
    assert 0 < sparsity["net_share"] <= sparsity["ever_share"] < 1
    assert main(["bench", "table", str(out)]) == 0
    assert "| synchronous | 1 |" in capsys.readouterr().out


def test_other_json_makes_no_table(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="does not hold rows of `gossamer bench rl`"):
        render_table(path)
