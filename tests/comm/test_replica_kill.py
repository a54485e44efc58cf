"""Replicas as processes that are killed, stopped and brought back: whoever lives holds one state
after every round, and no token is counted twice."""

import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import waiting
from gossamer.comm.outer.record import record_name, unpack_record
from outer_runs import PatientUntil
from toy_replicas import CONFIG, TOKENS, open_replica, run_round, trained_rows

ROUNDS = 10
FORKED = []
KILL_POINTS = {
    "in inner steps": (r"inner", "before"),
    "before its message": (r"rounds/\d{7}[2-9]/b-.*", "before"),
    "in its message": (r"rounds/\d{7}[2-9]/b-.*", "within"),
    "after its message": (r"rounds/\d{7}[2-9]/b-.*", "after"),
    "before the record": (r"round-\d{7}[2-9].json", "before"),
    "after the record, before it applies it": (r"round-\d{7}[2-9].json", "after"),
    "within an anchor": (r"anchors/\d{7}[3-9]/b-.*", "after"),
}


def fork(function, *arguments):
    """The process id of a child that runs the function; it ends with 0, or 1 after an error."""
    pid = os.fork()
    if pid:
        FORKED.append(pid)
        return pid
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException as error:
        print(f"{arguments[1:]}: {error!r}", flush=True)
    finally:
        os._exit(status)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(store, pattern, when):
    """Kills the process around the first put of a name that the pattern fits."""
    put = store.put

    def deadly(name, data, overwrite=False):
        hit = re.fullmatch(pattern, name)
        if hit and when == "before":
            die()
        if hit and when == "within":
            link = os.link
            os.link = lambda *a, **k: die()  # bytes are in a temporary file, the name is not there
            put(name, data, overwrite)
            os.link = link
        created = put(name, data, overwrite)
        if hit and when == "after":
            die()
        return created

    store.put = deadly


def live(folder, name, rounds=ROUNDS, kill=None, **options):
    """A replica until it has `rounds` rounds behind it and the file `enough` is there; writes the
    hash after each. Nobody is given up before the file `happened` is there."""
    config = replace(CONFIG, replica=name, poll_s=0.02, grace_s=0.5, **options)
    replica = open_replica(folder / "log", config, takeover=True)
    exchange, apply = replica._exchange, replica._apply
    exchange._config = PatientUntil(config, folder / "happened")

    def applied(settled):
        apply(settled)
        (folder / "seen" / f"{replica.number}-{name}-{os.getpid()}").write_text(replica.part_hash())

    replica._apply = applied
    if kill:
        arm(exchange._store, *kill)
    start = exchange.books().get(name, 0)
    while replica.number < rounds or not (folder / "enough").exists():
        rows = list(trained_rows(replica, start))
        if kill and replica.number >= 2:
            time.sleep(0.3)  # the last to send finds the round complete
            if kill[0] == "inner":
                die()
        time.sleep(0.1)
        replica.round(rows, start, TOKENS, replica.number)
        replica.catch_up()
        start += TOKENS


def ended(pid, timeout_s=200):
    """How the child ended, killed if need be."""
    FORKED.remove(pid)
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def records_of(folder):
    found = []
    while (path := Path(folder, "log", record_name(len(found)))).exists():
        found.append(unpack_record(path.read_bytes(), path.name))
    return found


wait_until = partial(waiting.wait_until, patience_s=200)


def wait_for_round(folder, number):
    wait_until(Path(folder, "log", record_name(number)).exists)


def check(folder):
    """One hash a round, whoever saw it; every token counted at most once. Records by round."""
    hashes = {}
    for path in Path(folder, "seen").iterdir():
        hashes.setdefault(int(path.name.split("-")[0]), set()).add(path.read_text())
    assert {number: len(each) for number, each in hashes.items() if len(each) > 1} == {}
    assert max(hashes) >= ROUNDS
    records, stops = records_of(folder), {}
    for record in records:
        for each in record.counted:
            assert each.tokens_before >= stops.get(each.replica, 0)
            stops[each.replica] = each.tokens_before + each.tokens
    assert stops == records[-1].books
    return records


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What children would compile, or load, each for itself."""
    run_round(open_replica(tmp_path_factory.mktemp("log"), replace(CONFIG, replica="a")), 0)


@pytest.fixture
def folder(tmp_path, compiled):
    Path(tmp_path, "seen").mkdir()
    yield tmp_path
    while FORKED:
        ended(FORKED[-1], timeout_s=0)


@pytest.mark.slow
@pytest.mark.parametrize("point", KILL_POINTS)
def test_one_is_killed_and_returns_and_a_fifth_joins(folder, point):
    options = {"expected_replicas": 4}
    others = [fork(lambda f, n: live(f, n, **options), folder, name) for name in "acd"]
    doomed = fork(lambda f, n: live(f, n, kill=KILL_POINTS[point], **options), folder, "b")
    assert ended(doomed) == -signal.SIGKILL
    (folder / "happened").touch()
    back = fork(lambda f, n: live(f, n, **options), folder, "b")
    fifth = fork(lambda f, n: live(f, n, **options), folder, "e")

    def have_both_counted():
        found = {(e.replica, e.incarnation) for r in records_of(folder) for e in r.counted}
        return {("b", 2), ("e", 1)} <= found

    wait_until(have_both_counted)
    (folder / "enough").touch()
    assert [ended(pid) for pid in (*others, back, fifth)] == [0] * 5
    records = check(folder)
    members = [{each.replica for each in record.counted} for record in records]
    assert members[0] == set("abcd")
    assert not any(record.refused for record in records)


@pytest.mark.slow
def test_one_that_stands_still_for_two_rounds_comes_back(folder):
    a, b, c = (fork(lambda f, n: live(f, n, expected_replicas=3), folder, n) for n in "abc")
    wait_for_round(folder, 2)
    os.kill(b, signal.SIGSTOP)
    (folder / "happened").touch()
    wait_for_round(folder, len(records_of(folder)) + 3)
    os.kill(b, signal.SIGCONT)
    (folder / "enough").touch()
    assert [ended(pid) for pid in (a, b, c)] == [0, 0, 0]
    records = check(folder)
    members = [{each.replica for each in record.counted} for record in records]
    assert any("b" not in each for each in members) and "b" in members[0]


@pytest.mark.slow
def test_all_but_one_die_and_it_goes_on(folder):
    pids = [fork(lambda f, n: live(f, n, expected_replicas=3), folder, n) for n in "abc"]
    wait_for_round(folder, 2)
    for pid in pids[1:]:
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    for name in ("happened", "enough"):
        (folder / name).touch()
    assert ended(pids[0]) == 0
    records = check(folder)
    assert [each.replica for each in records[-1].counted] == ["a"]


@pytest.mark.slow
def test_two_processes_that_claim_one_name(folder):
    """The newer one is the replica; the older one ends by itself."""
    other, old = (fork(lambda f, n: live(f, n, expected_replicas=2), folder, n) for n in "ab")
    wait_for_round(folder, 2)
    new = fork(lambda f, n: live(f, n, expected_replicas=2), folder, "b")
    assert ended(old) == 1
    for name in ("happened", "enough"):
        (folder / name).touch()
    assert [ended(pid) for pid in (other, new)] == [0, 0]
    check(folder)
