"""Who did what when: put together from events, and every second of a step is somebody's."""

import pytest
from gossamer.launch.change_charts import change_chart
from gossamer.launch.gantt import activities, gantt_chart, shares
from gossamer.launch.summary import read_events
from synthetic_run import write_run


def step(number, time_s, step_s, wait_s, phase="rl"):
    times = dict(time_s=time_s, step_s=step_s, wait_s=wait_s)
    return dict(event="train_step", phase=phase, step=number, loss=0.0, **times)


def engine(time_s, what, version, name="engine-0", **fields):
    return dict(event="engine", time_s=time_s, engine=name, what=what, version=version, **fields)


HAND_MADE = [
    dict(event="run_start", time_s=0.0, name="x", seed=1),
    step(1, 10.0, 10.0, 0.0, phase="warm_start"),
    engine(13.0, "generate", 0, generate_s=2.0, samples=4),  # 11 to 13: the trainer waits 10 to 13
    dict(
        event="publish", time_s=19.0, version=1, step=2
    )  # train 13 to 17, encode to 18, wire to 19
    | dict(kind="delta", frame_bytes=1, full_bytes=9, density=0.1)
    | dict(export_s=0.25, find_s=0.25, encode_s=0.5, put_s=0.75, wait_s=0.25),
    step(2, 20.0, 10.0, 3.0),
    engine(21.0, "commit", 1, stage_s=0.5, commit_s=0.5, pause_s=0.25),
    engine(25.0, "generate", 1, generate_s=4.0, samples=4),
    step(3, 30.0, 10.0, 5.0),
]


def test_a_hand_made_run():
    found = [(a.who, a.what, a.start_s, a.stop_s) for a in activities(HAND_MADE)]
    assert [f[1:] for f in found if f[0] == "trainer"] == [
        ("waiting", 10.0, 13.0),
        ("train", 13.0, 17.0),
        ("encode", 17.0, 18.0),
        ("wire", 18.0, 19.0),
        ("waiting", 20.0, 25.0),
        ("train", 25.0, 30.0),
    ]
    assert sorted(f[1:] for f in found if f[0] == "engine-0") == [
        ("apply", 20.75, 21.0),
        ("fetch and check", 20.0, 20.5),
        ("rollout", 11.0, 13.0),
        ("rollout", 21.0, 25.0),
        ("waiting", 10.0, 11.0),
        ("waiting", 13.0, 20.75),
        ("waiting", 25.0, 30.0),
    ]
    waits = [a.label for a in activities(HAND_MADE) if (a.who, a.what) == ("trainer", "waiting")]
    assert waits == ["step 2, for engine-0", "step 3, for engine-0"]
    own = shares(activities(HAND_MADE), "engine-0")
    assert own["rollout"] == 6 / 20 and sum(own.values()) == pytest.approx(1.0)


def test_scoring_is_nobodys_fault():
    judged = [e | {"score_s": 2.0} if e.get("step") == 3 else e for e in HAND_MADE]
    found = [(a.what, a.start_s, a.stop_s) for a in activities(judged) if a.who == "trainer"]
    assert found[-3:] == [("waiting", 20.0, 23.0), ("score", 23.0, 25.0), ("train", 25.0, 30.0)]
    assert shares(activities(judged), "trainer")["score"] == 2 / 20


def test_every_second_of_an_engine_is_counted_once(tmp_path):
    write_run(tmp_path)
    found = activities(read_events(tmp_path))
    for who in {a.who for a in found}:
        total = sum(shares(found, who).values())
        assert total == pytest.approx(1.0) or (who == "trainer" and total < 1.0)
        own = sorted((a.start_s, a.stop_s) for a in found if a.who == who and a.what == "waiting")
        assert all(stop <= start for (_, stop), (start, _) in zip(own, own[1:], strict=False))


def test_a_run_without_engines_is_told_in_a_sentence():
    assert gantt_chart(HAND_MADE[:2]).figure is None


def test_changes_are_drawn_by_layer_and_part():
    groups = ["model.norm.weight", "2/expert 9", "2/expert 10", "2/router", "10/router"]
    event = dict(event="change", time_s=1.0, step=8, since_step=0, steps=8, groups=groups)
    event |= {f"{name}_share": 0.5 for name in ("changed", "ever", "net", "kept", "seen")}
    event |= dict(elements=[10] * 5, net=[1, 2, 3, 4, 5])
    heat = change_chart([event]).figure.data[-1]
    assert heat.y == ("norm", "layer 2", "layer 10")
    assert heat.x == ("expert 9", "expert 10", "router", "all")
    nothing = None
    assert [list(row) for row in heat.z] == [
        [nothing, nothing, nothing, 10.0],
        [20.0, 30.0, 40.0, nothing],
        [nothing, nothing, 50.0, nothing],
    ]
    assert change_chart([]) is None
