"""What a killed writer leaves in a folder, and who takes it away."""

import os
import time

from gossamer.comm.store.local import ABANDONED_S, LocalStore


def test_what_killed_writers_left_is_swept_by_the_next_that_creates(tmp_path):
    store = LocalStore(str(tmp_path), create=True)
    store.put("parts/a", b"kept")
    old, new = tmp_path / "parts" / ".tmp-0123", tmp_path / ".tmp-4567"
    for path in (old, new):
        path.write_bytes(b"torn")
    long_ago_s = time.time() - ABANDONED_S - 10
    os.utime(old, (long_ago_s, long_ago_s))
    os.utime(tmp_path / "parts" / "a", (long_ago_s, long_ago_s))
    LocalStore(str(tmp_path))
    assert old.exists()  # a reader deletes nothing
    again = LocalStore(str(tmp_path), create=True)
    assert not old.exists() and new.exists()
    assert again.list("parts/") == ["parts/a"] and again.get("parts/a") == b"kept"
