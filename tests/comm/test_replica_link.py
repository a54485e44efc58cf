"""A replica whose link to the bucket is cut for some rounds, and that comes back."""

import threading
import time
from dataclasses import replace

import pytest
from bad_link import BadLink
from gossamer.comm.store import StoreError
from s3_server import S3Server, s3_environment
from toy_replicas import CONFIG, TOKENS, open_replica, run_round

ROUNDS = 8


@pytest.fixture
def bucket(monkeypatch):
    server = S3Server()
    server.put("replicas")
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "20")
    yield server
    server.close()


def open_at(port, name):
    config = replace(CONFIG, replica=name, expected_replicas=3, poll_s=0.02, grace_s=0.5)
    with s3_environment(port):
        return open_replica("s3://replicas/run", config)


def live(replica, found):
    """ROUNDS rounds; hashes by round, and the error that ended them, if any."""
    tokens = 0
    try:
        while replica.number < ROUNDS:
            run_round(replica, tokens)
            tokens += TOKENS
            found[replica.number] = replica.part_hash()
    except Exception as error:
        found["error"] = error


@pytest.mark.slow
@pytest.mark.parametrize("patience_s", [20, 1])
def test_a_link_that_is_cut_for_two_rounds(bucket, monkeypatch, patience_s):
    link = BadLink(bucket.port)
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", str(patience_s))
    far = open_at(link.port, "b")
    near = [open_at(bucket.port, name) for name in "ac"]
    found = [{}, {}, {}]
    threads = [
        threading.Thread(target=live, args=each) for each in zip([*near, far], found, strict=True)
    ]
    for thread in threads:
        thread.start()
    exchange = open_at(bucket.port, "watch")._exchange

    def wait_for(number):
        while exchange.next_round() <= number:
            time.sleep(0.02)

    wait_for(1)
    link.cut()
    wait_for(4)
    if patience_s == 1:
        threads[2].join(30)  # its patience is over, and it ends
    link.mend()
    for thread in threads:
        thread.join(60)
    link.close()
    if patience_s == 1:
        assert isinstance(found[2].pop("error"), StoreError)
    else:
        assert max(found[2]) == ROUNDS
    members = [{each.replica for each in exchange.record(n).counted} for n in range(ROUNDS)]
    assert "b" in members[0] and not all("b" in each for each in members)
    assert [each.keys() & {"error"} for each in found] == [set()] * 3
    for number in range(1, ROUNDS + 1):
        assert len({each[number] for each in found if number in each}) == 1
