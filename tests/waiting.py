"""Waiting for what another thread or process does."""

import time


def wait_until(holds, patience_s, every_s=0.01):
    """`holds()` is true, or the test fails after `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(every_s)
