"""summary.json's numbers, computed again by hand from small runs and from a killed one."""

from __future__ import annotations

import json
import math
import re

import pytest
from gossamer.launch.summary import (
    of_kind,
    read_events,
    saving_slowdown,
    settle,
    summarise,
    write_summary,
)
from synthetic_run import FULL_BYTES, SyntheticRun, write_run


def test_a_killed_and_resumed_run_counts_each_step_once(tmp_path):
    write_run(tmp_path)
    summary = summarise(tmp_path)
    assert summary["attempts"] == 2
    assert summary["steps"] == 120 + 60
    assert summary["engines_bit_exact"] is True
    assert summary["engines_dead"] == 1
    assert summary["end_reason"] == "done"
    assert (summary["name"], summary["seed"], summary["ep_size"]) == ("rl-sums", 7, 2)


def test_later_lines_win_and_what_they_undo_is_gone(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    for step in (1, 2, 3, 4):
        run.add("train_step", phase="rl", step=step, loss=1.0)
        run.add("change", phase="rl", step=step)
        run.eval(step)
    run.start(2)
    run.add("train_step", phase="rl", step=3, loss=2.0)
    events = settle(read_events(tmp_path))
    steps = [(e["step"], e["loss"]) for e in events if e["event"] == "train_step"]
    assert steps == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [e["step"] for e in events if e["event"] == "change"] == [1, 2]
    assert [e["step"] for e in events if e["event"] == "eval"] == [1, 2, 3]
    run.eval(3)
    evals = [e for e in settle(read_events(tmp_path)) if e["event"] == "eval"]
    assert [e["step"] for e in evals] == [1, 2, 3]
    assert evals[-1]["time_s"] == run.time_s


def test_a_resume_in_the_warm_start_takes_back_the_rl_phase(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    run.add("train_step", phase="warm_start", step=1, loss=4.0)
    run.add("train_step", phase="rl", step=1, loss=0.0)
    run.eval(1)
    run.start(2)
    run.add("train_step", phase="warm_start", step=1, loss=3.0)
    summary = summarise(tmp_path)
    assert (summary["steps"], summary["loss_first"], summary["reward_last"]) == (1, 3.0, None)


def test_reward_is_that_of_heldout_problems_in_the_rl_phase(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    evals = iter([0.1, 0.2, 0.9, 0.3])

    def evaluate(name):
        run.add("eval", name=name, step=0, exact_match=next(evals), problems=9)

    evaluate("heldout")  # before the warm start: not of the RL phase
    run.add("train_step", phase="warm_start", step=1, loss=4.0)
    evaluate("heldout")
    run.add("train_step", phase="rl", step=1, loss=0.0)
    evaluate("dev")
    evaluate("heldout")
    summary = summarise(tmp_path)
    assert (summary["reward_first"], summary["reward_last"]) == (0.2, 0.3)
    assert summary["heldout_problems"] == 9


def test_a_phase_is_rl_by_its_kind_whatever_its_name(tmp_path):
    run = SyntheticRun(tmp_path)
    phases = [{"name": "sft", "kind": "next_token"}, {"name": "polish", "kind": "grpo"}]
    run.add("run_start", name="x", seed=1, phases=phases)
    run.add("train_step", phase="sft", step=1, loss=4.0)
    run.eval(1)
    run.add("train_step", phase="polish", step=2, loss=-9.0)
    summary = summarise(tmp_path)
    assert summary["loss_last"] == 4.0
    assert summary["reward_first"] == summary["reward_last"] is not None


def test_loss_is_a_mean_of_ten_steps_outside_rl(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    for step in range(15):
        run.add("train_step", phase="warm_start", step=step, loss=float(step))
    run.add("train_step", phase="rl", step=0, loss=-100.0)
    summary = summarise(tmp_path)
    assert summary["loss_first"] == sum(range(10)) / 10
    assert summary["loss_last"] == sum(range(5, 15)) / 10


def test_what_was_skipped_held_out_and_the_mfu(tmp_path):
    """MFU is over all time: a step twice as long weighs twice."""
    run = SyntheticRun(tmp_path)
    run.start(1)
    for step, (loss, mfu, step_s) in enumerate([(3.0, 0.1, 2.0), (float("nan"), 0.4, 1.0)], 1):
        timed = {"mfu": mfu, "step_s": step_s, "skipped": loss != loss}
        run.add("train_step", phase="pretrain", step=step, loss=loss, **timed)
        run.add("eval", name="text", step=step, phase="pretrain", loss=4.0 - step, tokens=9)
    summary = summarise(tmp_path)
    assert (summary["loss_last"], summary["skips"]) == (3.0, 1)
    assert (summary["heldout_loss_first"], summary["heldout_loss_last"]) == (3.0, 2.0)
    assert math.isclose(summary["mfu_mean"], (0.1 * 2 + 0.4) / 3)


def test_bytes_and_density(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    for version, kind, frame_bytes, density in [
        (0, "anchor", 900, 1.0),
        (1, "delta", 10, 0.01),
        (2, "delta", 30, 0.03),
    ]:
        run.add(
            "publish",
            after_s=1.0,
            version=version,
            kind=kind,
            frame_bytes=frame_bytes,
            full_bytes=FULL_BYTES,
            density=density,
        )
    summary = summarise(tmp_path)
    assert (summary["versions"], summary["version_last"]) == (3, 2)
    assert (summary["wire_bytes"], summary["full_bytes"]) == (940, 3 * FULL_BYTES)
    assert math.isclose(summary["change_density_mean"], 0.02)
    assert summary["wall_s"] == 3.0
    assert summary["reward_first"] is None and summary["loss_last"] is None


@pytest.mark.parametrize("fault", ["unequal", "stale", "unaudited", "no audit at all"])
def test_bit_exact_needs_an_equal_audit_of_every_engine_at_the_last_version(tmp_path, fault):
    run = SyntheticRun(tmp_path)
    run.start(1)
    run.publish(1)
    if fault != "no audit at all":
        run.audit("engine-0")
        if fault != "unaudited":
            run.audit("engine-1")
            assert summarise(tmp_path)["engines_bit_exact"] is True
    if fault == "unequal":
        run.audit("engine-1", equal=False)
    if fault == "stale":
        run.publish(2)
    assert summarise(tmp_path)["engines_bit_exact"] is False
    if fault == "unaudited":
        run.add("engine", engine="engine-1", what="dead")
        assert summarise(tmp_path)["engines_bit_exact"] is True


def test_engines_of_an_earlier_attempt_owe_no_audit(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    run.publish(1)
    run.add("engine", engine="engine-2", what="replaced", version=None)
    run.commit("engine-2")
    run.start(2)
    run.audit("engine-0")
    assert summarise(tmp_path)["engines_bit_exact"] is False  # engine-1 was started, too
    run.audit("engine-1")
    assert summarise(tmp_path)["engines_bit_exact"] is True
    assert summarise(tmp_path)["engines"] == 2


def test_a_torn_last_line_is_left_out(tmp_path):
    run = write_run(tmp_path)
    whole = read_events(tmp_path)
    with run.path.open("a") as file:
        file.write('{"event": "train_step", "ti')
    assert read_events(tmp_path) == whole


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"event": "trai', "expected one JSON object"),
        ("[1, 2]", "field 'event'"),
        ('{"event": "eval"}', "needs the field 'time_s'"),
        ('{"event": "audit", "time_s": 1, "engine": "e", "version": 2}', "the field 'equal'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, why):
    run = SyntheticRun(tmp_path)
    run.start(1)
    with run.path.open("a") as file:
        file.write(line + "\n")
    run.add("run_end", reason="done")
    with pytest.raises(ValueError, match=re.escape("metrics.jsonl:5: ") + ".*" + re.escape(why)):
        read_events(tmp_path)


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        summarise(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"event": "run_end", "time_s": 1}\n')
    with pytest.raises(ValueError, match="no run_start"):
        summarise(tmp_path)


def test_written_whole_and_strict_json_even_when_a_loss_is_nan(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    run.add("train_step", phase="pretrain", step=1, loss=math.nan)
    path = write_summary(tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == summarise(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_a_run_that_published_nothing_owes_no_proof(tmp_path):
    SyntheticRun(tmp_path).start(1)
    assert summarise(tmp_path)["engines_bit_exact"] is None


def test_steps_beside_a_checkpoints_write_are_set_apart(tmp_path):
    run = SyntheticRun(tmp_path)
    run.start(1)
    times_s = {True: (1.0, 3.0, 1.5), False: (1.0, 1.2, 0.8, 1.0)}
    for saving, each in times_s.items():
        for step_s in each:
            run.add("train_step", phase="a", step=1, loss=1.0, step_s=step_s, saving=saving)
    fields = {"phase": "rl", "loss": 0.0, "step_s": 99.0, "reward_mean": 0.1, "saving": True}
    run.add("train_step", step=2, **fields)
    assert saving_slowdown(of_kind(read_events(tmp_path), "train_step")) == 1.5
    assert saving_slowdown([]) is None
