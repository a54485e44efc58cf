"""What chaos draws, and that it counts nothing as broken that was not; nothing is started."""

import time
from types import SimpleNamespace

import chaos
import pytest
from chaos import Chaos, _break_until


class Run:
    """An operator of a run that makes 50 updates a second, after a start of a fifth of a second."""

    def __init__(self, tmp_path, pool=None):
        self.run_dir, self.pool, self.start_s = tmp_path, pool, time.time()
        self.cluster = self.broken = None
        (tmp_path / "metrics.jsonl").touch()

    def updates(self):
        begun_s = self.start_s + 0.2
        made = int(max(0.0, time.time() - begun_s) * 50)
        return [(begun_s + step / 50, step) for step in range(1, made + 1)]

    def pool_pid(self):
        return self.pool

    def pid(self, role):
        return None

    def is_finished(self):
        return time.time() > self.start_s + 1.4

    def look(self):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(chaos, "STALL_S", 0.8)
    monkeypatch.setattr(chaos, "_updates", lambda operator: operator.updates())
    monkeypatch.setattr(chaos, "ACTORS", {"pool": 1})
    monkeypatch.setattr(chaos, "THINGS", {"actor": 1})
    monkeypatch.setattr(Chaos, "pause_s", lambda self: 0.1)


def test_when_is_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.undo()
    drawn = [
        [Chaos(Run(tmp_path), tmp_path, seed, False).pause_s() for _ in "ab"] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_pool_that_is_not_found_is_a_fault_and_not_a_thing_broken(tmp_path):
    run = Run(tmp_path)
    told, faults = _break_until(run, Chaos(run, tmp_path, 0, False), 5.0)
    assert told == [] and faults == ["a living pool was not found within 0.8 s"]


def test_the_minutes_begin_with_the_updates(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(chaos, "os", SimpleNamespace(kill=lambda pid, _: killed.append(pid)))
    run = Run(tmp_path, pool=7)
    told, faults = _break_until(run, Chaos(run, tmp_path, 0, False), 0.15)  # less than the start
    assert faults == [] and killed == [7] * len(told) and told[0].what == "SIGKILL to pool"
