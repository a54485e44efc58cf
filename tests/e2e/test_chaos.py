"""A run that things break around for CHAOS_MINUTES (10) is, by its books, the undisturbed run."""

import json
import os

import pytest
from chaos import run_chaos
from gossamer.launch.testbed import unusable

MINUTES, SEED = float(os.environ.get("CHAOS_MINUTES", 10)), int(os.environ.get("CHAOS_SEED", 0))
STALENESS = int(os.environ.get("CHAOS_STALENESS", 0))


@pytest.mark.chaos
@pytest.mark.timeout(0)  # its waits have limits of their own
def test_a_run_outlives_chaos(tmp_path):
    if reason := unusable():
        pytest.skip(reason)
    report = run_chaos(tmp_path, SEED, MINUTES, staleness=STALENESS)
    print(json.dumps(report, indent=1))
    assert report["broken"] and report["faults"] == []
