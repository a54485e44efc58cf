"""`gossamer bench replicas`: trainings that are what they say, rows that follow from the file."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from statistics import mean

import pytest
import torch
from gossamer.launch.bench import replicas, replicas_record
from gossamer.launch.bench.replicas_arms import (
    DENSITIES,
    MODELS,
    QUICK,
    Arm,
    Training,
    grid,
    questions,
    sparseloco,
    tuning,
)
from gossamer.launch.bench.replicas_member import Member, is_present
from gossamer.launch.bench.replicas_table import render_table
from gossamer.launch.bench.replicas_train import train_in_threads
from gossamer.launch.cli import main
from gossamer.launch.testbed import unusable

SIZES = replace(QUICK, replicas=3, rounds=2)
COLUMNS = (
    "rule density error_feedback link_mbit model seed tokens loss wire_bytes wall_s utilisation"
)


def of(arm: Arm, model: str = "dense", purpose: str = "grid", seed: int = 1) -> Training:
    return Training(purpose=purpose, model=model, seed=seed, arm=arm)


def members(arm: Arm, model: str) -> list[Member]:
    return [Member(arm, SIZES, model, 1, number) for number in range(SIZES.replicas)]


def write_mean(rows: list[list]) -> None:
    """Every replica's rows become the mean, element by element."""
    for same in zip(*rows, strict=True):
        middle = torch.stack([each.values for each in same]).mean(0)
        for each in same:
            each.values.copy_(middle)


@pytest.mark.parametrize("model", MODELS)
def test_averaging_and_ddp_are_means_of_weights_and_of_gradients(model):
    averaging, ddp = Arm(rule="averaging", clip_to_median=0.0), Arm(rule="ddp")
    trained = {arm.rule: train_in_threads(of(arm, model), SIZES) for arm in (averaging, ddp)}
    losses = {"averaging": [], "ddp": []}
    all_members = members(averaging, model)
    for at in range(SIZES.rounds):
        for each in all_members:
            for i in range(SIZES.inner_steps):
                each.backward()
                each.step(at * SIZES.inner_steps + i)
        write_mean([each.rows() for each in all_members])
        losses["averaging"].append(all_members[0].evaluate())
    all_members = members(ddp, model)
    for step in range(SIZES.steps):
        for each in all_members:
            each.backward()
        write_mean([each.gradients() for each in all_members])
        for each in all_members:
            each.step(step)
        if (step + 1) % SIZES.inner_steps == 0:
            losses["ddp"].append(all_members[1].evaluate())
    for rule, expected in losses.items():
        found = [loss for _, loss in trained[rule]["curve"]]
        assert found == pytest.approx(expected, abs=2e-3)
        assert abs(found[0] - found[1]) > 0.02
    assert trained["ddp"]["curve"][-1][0] == SIZES.steps * SIZES.step_tokens
    numbers = sum(rows.values.numel() for rows in all_members[0].rows())
    assert trained["ddp"]["wire_bytes"] == 4 * numbers * SIZES.steps


def test_who_is_away_and_who_lies_matters_and_replicas_end_alike():
    arms = [sparseloco(), replace(sparseloco(), away=0.5), replace(sparseloco(), scale=1000.0)]
    arms += [replace(sparseloco(), leaves=True, absence="hand_over"), Arm(rule="dgc", density=0.1)]
    ends = [train_in_threads(of(arm), SIZES)["curve"][-1][1] for arm in arms]
    assert len(set(ends)) == len(arms)
    assert train_in_threads(of(arms[0]), SIZES)["curve"][-1][1] == ends[0]
    longer = train_in_threads(of(replace(arms[0], longer=2)), SIZES)["curve"]
    assert longer[-1][0] == 2 * SIZES.steps * SIZES.step_tokens


def test_two_replicas_at_least_are_there_and_the_one_that_left_stays_away():
    away, sizes = Arm(rule="averaging", away=0.5), replace(SIZES, replicas=4, rounds=200)
    there = [[is_present(away, sizes, 1, at, n) for n in range(4)] for at in range(200)]
    assert all(there[0]) and all(sum(each) >= 2 for each in there)
    assert 0.5 < mean(sum(each) / 4 for each in there) < 0.65
    left = Arm(rule="averaging", leaves=True)
    assert [is_present(left, sizes, 1, at, 3) for at in (0, 99, 100, 199)] == [
        True,
        True,
        False,
        False,
    ]
    assert is_present(left, sizes, 1, 199, 0)


def test_the_grid_has_the_arms_that_it_must_and_no_seed_of_tuning():
    def best(rule: str) -> Arm:
        return sparseloco() if rule == "sparseloco" else Arm(rule=rule)

    found = {}
    for each in grid(best):
        key = each.model, each.arm.rule, each.arm.density, each.arm.error_feedback
        found.setdefault(key, set()).add(each.seed)
    rules = {rule for _, rule, _, _ in found}
    assert rules == {"ddp", "averaging", "diloco", "sparseloco", "dgc"}
    for model in MODELS:
        assert all((model, "sparseloco", d, e) in found for d in DENSITIES for e in (True, False))
    assert all(len(seeds) >= 3 - (key[3] is False) for key, seeds in found.items())
    assert {each.seed for each in tuning()}.isdisjoint(set().union(*found.values()))
    assert {each.arm.absence for each in questions(best)} == {"keep", "decay", "drop", "hand_over"}


def made_up(path, losses: dict[tuple[str, int], list[float]]) -> replicas_record.Record:
    """A record of trainings whose curves are given by (rule, seed), a link, and a check."""
    record = replicas_record.Record(path, QUICK, f"{replicas.COMMAND} --quick")
    arms = {"averaging": Arm(rule="averaging"), "sparseloco": sparseloco()}
    arms["without"] = sparseloco(error_feedback=False)
    for (rule, seed), curve in losses.items():
        tokens = QUICK.inner_steps * QUICK.step_tokens
        points = [(tokens * (at + 1), loss) for at, loss in enumerate(curve)]
        training = of(arms[rule], seed=seed)
        answer = {"curve": points, "hash": "h", "wire_bytes": 1000, "step_s": 0.5}
        record.add("trainings", {"training": asdict(training), **answer})
    for rule, exchange_s in (("averaging", [9.0, 2.0, 2.0]), ("sparseloco", [0.1, 0.1, 0.1])):
        link = {"exchange_s": exchange_s, "exchanges": 4, "link_bytes": 4000}
        training = asdict(of(arms[rule], purpose="link"))
        record.add("links", {"training": training, "link_mbit": 10, **link})
    check = {"loss": 3.0, "hashes": ["h"], "wall_s": 9.0, "compute_s": 4.0}
    training = asdict(of(arms["sparseloco"], purpose="check"))
    record.add("checks", {"training": training, "link_mbit": 10, **check})
    return record


def test_rows_are_composed_and_the_table_says_who_never_came_to_the_target(tmp_path, capsys):
    path, page = tmp_path / "out.json", tmp_path / "page.md"
    curves = {
        ("averaging", 1): [5.0, 4.0, 3.2],
        ("averaging", 2): [5.0, 4.0, 3.4],
        ("sparseloco", 1): [5.0, 3.1, 3.0],
        ("sparseloco", 2): [5.0, 3.9, 3.8],
        ("without", 1): [5.0, 4.9, 4.8],
        ("without", 2): [5.0, 3.9, 3.7],
    }
    made_up(path, curves).finish()
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 6 and set(COLUMNS.split()) <= set(rows[0])
    averaging, _, sparse, _, never, _ = rows
    # six steps of half a second, three exchanges of two
    assert averaging["wall_s"] == pytest.approx(6 * 0.5 + 3 * 2.0)
    assert averaging["utilisation"] == pytest.approx(1 / 3)
    assert averaging["link_bytes"] == 3000 and averaging["target_loss"] == 3.8
    # the first two of its rounds were enough
    assert sparse["tokens_to_target"] * 3 == sparse["tokens"] * 2
    assert sparse["wall_to_target_s"] == pytest.approx(2 / 3 * (3.0 + 0.3))
    assert never["tokens_to_target"] is None and never["wall_to_target_s"] is None

    page.write_text("<!-- bench replicas: begin -->\nold\n<!-- bench replicas: end -->\n")
    assert main(["bench", "table", str(path), "--into", str(page)]) == 0
    text = page.read_text()
    assert "| averaging | 2 | 3.300 [3.200, 3.400] |" in text and "\nold\n" not in text
    assert "| sparseloco 3.12 % | 2 | 3.400 [3.000, 3.800] |" in text
    assert "| sparseloco 3.12 %, no error feedback | 2 |" in text and "(1 of 2)" in text
    check = "9.0 s for all rounds, 4.0 s of them computing (each round's slowest replica; four on"
    assert (
        f"{check} these cores) and 5.0 s not; composed, with a core each: 3.0 s and 0.3 s." in text
    )
    assert "Loss 3.000000 (to the bit)." in text
    with pytest.raises(ValueError, match="holds other measurements; expected a new file"):
        replicas_record.Record(path, SIZES, f"{replicas.COMMAND} --quick")
    path.write_text('{"command": "gossamer bench replicas"}')
    assert main(["bench", "table", str(path)]) == 1
    assert "does not hold rows of `gossamer bench replicas`" in capsys.readouterr().err


def test_what_was_trained_is_not_trained_again_and_keeps_all_its_purposes(tmp_path):
    path = tmp_path / "out.json"
    made_up(path, {("averaging", 1): [5.0], ("sparseloco", 1): [5.0]})
    record = replicas_record.Record(path, QUICK, f"{replicas.COMMAND} --quick")
    asked = of(replace(sparseloco(), clip_to_median=3.0), purpose="clipping, all honest")
    replicas.train(record, [asked])
    assert not record.is_trained(of(replace(sparseloco(), clip_to_median=1.0)))
    record.finish()
    assert "| clipping, all honest | clip_to_median 3 | 1 | 5.000 |" in render_table(path)


@pytest.mark.slow
def test_processes_over_a_network_end_with_the_bits_of_threads(tmp_path):
    arm, sizes = sparseloco(), replace(SIZES, replicas=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    task = {"training": asdict(of(arm, "moe")), "sizes": asdict(sizes), "rounds": 2, "waits": True}
    words = ["-m", replicas.WORKER, "link"]
    ranks = [
        subprocess.Popen(
            [sys.executable, *words, str(rank), "2", "127.0.0.1", "127.0.0.1", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            rank.stdin.write(json.dumps(task) + "\n")
            rank.stdin.flush()
        answers = [json.loads(rank.communicate(timeout=300)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # nothing happens to one that is over
            rank.wait()
    expected = train_in_threads(of(arm, "moe"), sizes)
    assert {each["hash"] for each in answers} == {expected["hash"]}
    assert answers[0]["curve"] == [list(point) for point in expected["curve"]]
    assert all(len(each["exchange_s"]) == 2 for each in answers)


@pytest.mark.testbed
def test_a_quick_run_over_a_shaped_link_goes_on_where_it_was_cut(tmp_path, capsys):
    if reason := unusable():
        pytest.skip(reason)
    path = tmp_path / "out.json"
    assert main(["bench", "replicas", "--quick", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 6 and {row["link_mbit"] for row in found["rows"]} == {100}
    for row in found["rows"]:
        # three copies of a frame, or twice three quarters of all gradients, and TCP's headers
        copies = 1.5 if row["rule"] == "ddp" else 3
        assert 1 <= row["link_bytes"] / (copies * row["wire_bytes"]) < 2.5
        assert 0 < row["utilisation"] < 1
    del found["trainings"][-1], found["links"][-1]
    path.write_text(json.dumps(found))
    capsys.readouterr()
    assert main(["bench", "replicas", "--quick", "--json", str(path)]) == 0
    assert capsys.readouterr().err.count("loss") == 1
    again = json.loads(path.read_text())
    assert len(again["rows"]) == 6 and again["trainings"][:-1] == found["trainings"]
