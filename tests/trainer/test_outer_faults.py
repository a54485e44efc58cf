"""Replicas in training that die, lag, lie, come and go: whoever lives holds one state after every
round, and no token is trained twice by the books."""

import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from bad_link import BadLink
from gossamer.comm.outer.retention import sweep
from gossamer.comm.store import open_store
from outer_runs import Fault, Running, finish, hashes, records, settings
from s3_server import KEYS, S3Server
from tiny_run import events

ROUNDS = 8
PATIENCE_S = 300.0
PATIENT = {"grace_s": PATIENCE_S}
"""Nobody is given up."""
BRIEF = {"grace_s": 1.0, "deadline_s": PATIENCE_S, "inner_steps": 1}
"""Nobody is given up before `happened`, however slow the machine."""


def live(root: Path, name: str, num_replicas: int, attempt: int = 1, **how) -> Running:
    """A replica of so many, by the letter of its name."""
    fault, environment = how.pop("fault", Fault(when="never")), how.pop("environment", None)
    fault = replace(fault, patient_until=str(root / "happened"))
    rounds, folder = how.pop("rounds", root / "rounds"), how.pop("folder", name)
    config = settings(name, "abcde".index(name), 5, rounds, **BRIEF | how)
    config["outer"]["expected_replicas"] = num_replicas
    config["phases"][0]["max_steps"] = ROUNDS * config["outer"]["inner_steps"]
    return Running(root / folder, config, attempt, fault, environment)


def happened(root: Path) -> None:
    """From here on whoever is missing is given up after a second."""
    (root / "happened").touch()


def wait_for_round(root: Path, number: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (root / "rounds" / f"round-{number:08d}.json").exists():
        assert time.monotonic() < deadline_s, f"round {number} was not settled"
        time.sleep(0.02)


def check(root: Path, names: str, found: list[dict] | None = None) -> list[dict]:
    """One hash a round, whoever saw it; every token is counted at most once. The records."""
    seen: dict[int, set[str]] = {}
    for name in names:
        for number, state in hashes(root / name).items():
            seen.setdefault(number, set()).add(state)
    assert {number: each for number, each in seen.items() if len(each) > 1} == {}
    found = found or records(root / "rounds")
    stops: dict[str, int] = {}
    for record in found:
        for each in record["counted"]:
            assert each["tokens_before"] >= stops.get(each["replica"], 0)
            stops[each["replica"]] = each["tokens_before"] + each["tokens"]
    assert stops == found[-1]["books"]
    return found


def members(found: list[dict]) -> list[str]:
    """Who counted in each round."""
    return ["".join(sorted({each["replica"] for each in r["counted"]})) for r in found]


def ended_with(running: Running, error: str) -> None:
    assert running.ended() == [1]
    assert error in running.error()


POINTS = {
    "in inner steps": Fault(after_update=3),
    "while it puts its message": Fault(r"rounds/0000000[2-9]/b-.*"),
    "after its message": Fault(r"rounds/0000000[2-9]/b-.*", "after"),
    "before it applies a round": Fault(after_settle=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_one_of_four_dies_and_comes_back_and_a_fifth_joins(tmp_path, point):
    others = [live(tmp_path, name, 4, inner_steps=2) for name in "acd"]
    doomed = live(tmp_path, "b", 4, inner_steps=2, fault=POINTS[point])
    assert doomed.ended() == [-signal.SIGKILL], doomed.error()
    happened(tmp_path)
    wait_for_round(tmp_path, 2)
    back = live(tmp_path, "b", 4, inner_steps=2, attempt=2)
    fifth = live(tmp_path, "e", 4, inner_steps=2)
    finish(*others, back, fifth)
    found = check(tmp_path, "abcde")
    assert members(found)[0] == "abcd" and not any(record["refused"] for record in found)
    # whoever is there at the end holds the last state, and ends at the last step
    assert {events(tmp_path / n, "run_end")[-1]["step"] for n in "abcde"} == {2 * ROUNDS}
    start = events(tmp_path / "e", "outer_start")[-1]
    assert start["source"] == "anchor" and start["round"] > 0


@pytest.mark.slow
def test_one_that_sends_garbage_is_refused_and_starts_again_from_an_anchor(tmp_path):
    a = live(tmp_path, "a", 2, **PATIENT)
    liar = live(tmp_path, "b", 2, **PATIENT, fault=Fault(r"rounds/00000003/b-.*", garbage=True))
    ended_with(liar, "RefusedError: round 3 does not count this replica")
    back = live(tmp_path, "b", 2, attempt=2, **PATIENT)
    finish(a, back)
    found = check(tmp_path, "ab")
    assert list(found[3]["refused"]) == ["b"] and members(found)[3] == "a"
    start = events(tmp_path / "b", "outer_start")[-1]
    assert (start["source"], start["incarnation"]) == ("anchor", 2)
    assert members(found)[-1] == "ab" and start["round"] >= 4


@pytest.mark.slow
def test_one_with_nan_ends_itself_and_sends_nothing(tmp_path):
    a = live(tmp_path, "a", 2)
    sick = live(tmp_path, "b", 2, fault=Fault(at_round=3, scale=float("nan")))
    ended_with(sick, "not finite")
    happened(tmp_path)
    finish(a)
    found = check(tmp_path, "ab")
    assert members(found)[0] == "ab" and "b" not in members(found)[3]
    assert not list((tmp_path / "rounds/rounds/00000003").glob("b-*"))


@pytest.mark.slow
def test_a_norm_a_thousand_times_too_large_is_clipped(tmp_path):
    runs = [live(tmp_path, name, 3, **PATIENT) for name in "ac"]
    loud = live(tmp_path, "b", 3, **PATIENT, fault=Fault(at_round=3, scale=1000.0))
    finish(*runs, loud)
    found = check(tmp_path, "abc")
    assert members(found) == ["abc"] * ROUNDS
    losses = [event["loss"] for event in events(tmp_path / "a", "train_step")]
    assert max(losses[4:]) < max(losses[:4])


@pytest.mark.slow
def test_two_processes_that_claim_one_name(tmp_path):
    """The newer one is the replica; the older one ends by itself."""
    a = live(tmp_path, "a", 2, **PATIENT)
    taken = str(tmp_path / "rounds/replicas/b-e0002.json")
    fault = Fault(r"rounds/00000003/b-e0001.*", wait_for=taken)
    old = live(tmp_path, "b", 2, **PATIENT, fault=fault)
    wait_for_round(tmp_path, 2)
    second = live(tmp_path, "b", 2, **PATIENT, folder="second")
    ended_with(second, "StaleWriterError: replica b exists")
    new = live(tmp_path, "b", 2, attempt=2, **PATIENT)
    finish(a, new)
    assert old.ended() == [1]
    found = check(tmp_path, "ab")
    assert members(found)[-1] == "ab"
    assert {e["incarnation"] for e in found[-1]["counted"] if e["replica"] == "b"} == {2}


@pytest.mark.slow
def test_all_but_one_die_and_it_goes_on(tmp_path):
    a = live(tmp_path, "a", 3)
    doomed = [live(tmp_path, name, 3, fault=Fault(after_update=3)) for name in "bc"]
    for each in doomed:
        assert each.ended() == [-signal.SIGKILL]
    happened(tmp_path)
    finish(a)
    found = check(tmp_path, "abc")
    assert members(found)[0] == "abc" and members(found)[-1] == "a" and len(found) == ROUNDS


@pytest.mark.slow
def test_a_link_that_is_cut_for_two_rounds(tmp_path):
    """Of one replica to the bucket; the others go on, and it comes back by itself."""
    with ExitStack() as stack:
        server = S3Server()
        stack.callback(server.close)
        server.put("replicas")
        link = BadLink(server.port)
        stack.callback(link.close)

        def at(port: int) -> dict:
            url = f"http://127.0.0.1:{port}"
            patience = {"GOSSAMER_STORE_PATIENCE_S": f"{PATIENCE_S}"}
            return KEYS | {"AWS_ENDPOINT_URL": url} | patience

        def rounds_of(name: str) -> list[dict]:
            path = tmp_path / name / "metrics.jsonl"
            return events(tmp_path / name, "outer_round") if path.exists() else []

        def wait_for(name: str, num_rounds: int) -> None:
            deadline_s = time.monotonic() + PATIENCE_S
            while len(rounds_of(name)) < num_rounds:
                assert time.monotonic() < deadline_s, f"{name} has not seen {num_rounds} rounds"
                time.sleep(0.02)

        how = {"rounds": "s3://replicas/run", "inner_steps": 2}
        near = [live(tmp_path, n, 3, environment=at(server.port), **how) for n in "ac"]
        # it sends nothing of round 2 before the link is cut
        fault = Fault(r"rounds/00000002/b-.*", wait_for=str(tmp_path / "happened"))
        far = live(tmp_path, "b", 3, environment=at(link.port), fault=fault, **how)
        wait_for("b", 2)
        link.cut()
        happened(tmp_path)
        wait_for("a", 5)
        link.mend()
        finish(*near, far)
    seen: dict[int, set[str]] = {}
    for name in "abc":
        for number, state in hashes(tmp_path / name).items():
            seen.setdefault(number, set()).add(state)
    assert all(len(each) == 1 for each in seen.values())
    told = rounds_of("a")
    assert told[0]["counted"] == ["a", "b", "c"] and any("b" not in e["counted"] for e in told)
    assert max(hashes(tmp_path / "b")) == ROUNDS


@pytest.mark.slow
def test_one_that_was_away_until_its_rounds_were_deleted_takes_the_newest_anchor(tmp_path):
    a = live(tmp_path, "a", 2, inner_steps=2)
    doomed = live(tmp_path, "b", 2, inner_steps=2, fault=Fault(after_update=5))
    assert doomed.ended() == [-signal.SIGKILL]
    happened(tmp_path)
    wait_for_round(tmp_path, 6)
    sweep(open_store(tmp_path / "rounds"), keep_anchors=1, grace_s=0.0)
    back = live(tmp_path, "b", 2, attempt=2, inner_steps=2)
    finish(a, back)
    check(tmp_path, "ab")
    start = events(tmp_path / "b", "outer_start")[-1]
    assert start["source"] == "anchor" and start["round"] >= 7
    assert events(tmp_path / "b", "run_end")[-1]["step"] == 2 * ROUNDS
