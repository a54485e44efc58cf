"""What chaos draws, and that it counts nothing as broken that was not; nothing is started."""

from types import SimpleNamespace

import chaos
import pytest
from chaos import STALL_S, Chaos, _break_until

START_S = 200.0
"""Of a run that takes a while until its updates begin, one a second."""


class Run:
    """An operator of a run of an hour, by a clock that moves when somebody sleeps."""

    def __init__(self, tmp_path, pool=None):
        self.run_dir, self.pool, self.now_s, self.start_s = tmp_path, pool, 0.0, 0.0
        self.cluster = self.broken = None

    def sleep(self, seconds):
        self.now_s += seconds

    def updates(self):
        return [(START_S + step, step) for step in range(1, int(self.now_s - START_S) + 1)]

    def pool_pid(self):
        return self.pool

    def pid(self, role):
        return None

    def is_finished(self):
        return self.now_s > 3600

    def look(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    run = Run(tmp_path)
    clock = SimpleNamespace(time=lambda: run.now_s, monotonic=lambda: run.now_s, sleep=run.sleep)
    monkeypatch.setattr(chaos, "time", clock)
    monkeypatch.setattr(chaos, "_updates", lambda operator: operator.updates())
    monkeypatch.setattr(chaos, "ACTORS", {"pool": 1})
    monkeypatch.setattr(chaos, "THINGS", {"actor": 1})
    return run


def test_when_is_of_the_seed(run, tmp_path):
    drawn = [
        [made.pause_s() for _ in range(3)]
        for made in (Chaos(run, tmp_path, seed, False) for seed in (1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_pool_that_is_not_found_is_a_fault_and_not_a_thing_broken(run, tmp_path):
    told, faults = _break_until(run, Chaos(run, tmp_path, 0, False), 60.0)
    assert told == [] and faults == [f"a living pool was not found within {STALL_S:g} s"]


def test_the_minutes_begin_with_the_updates(run, tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(chaos, "os", SimpleNamespace(kill=lambda pid, _: killed.append(pid)))
    monkeypatch.setattr(Run, "is_finished", lambda self: self.now_s > START_S + 150)
    run.pool = 7
    told, faults = _break_until(run, Chaos(run, tmp_path, 0, False), 60.0)  # less than the start
    assert faults == [] and killed == [7] * len(told) and len(told) > 3
    assert START_S < told[0].at_s and told[-1].at_s < START_S + 80
