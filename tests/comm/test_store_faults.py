"""A log whose store is away, refuses, lies or holds other people's files."""

import json
import os
import threading
import time

import pytest
from bad_link import BadLink
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import read_state
from gossamer.comm.store import StoreError, open_store
from gossamer.comm.store.serve import serve
from gossamer.comm.subscriber import Subscriber
from s3_server import S3Server, s3_environment
from toy_weights import CONFIG, moved, new_writer, rows_of, same_bits, toy_state, zeros

OUTAGES_S = [0.6, pytest.param(30.0, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def s3_server():
    started = S3Server()
    yield started
    started.close()


@pytest.fixture
def far(s3_server, tmp_path, monkeypatch):
    """A log in a bucket behind a link: (its URL, the link)."""
    link, bucket = BadLink(s3_server.port), tmp_path.name.replace("_", "-")
    s3_server.put(bucket)
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "5")
    with s3_environment(link.port):
        yield f"s3://{bucket}/run", link
    link.close()


@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_an_outage_is_survived_by_whoever_was_told_to(far, outage_s, monkeypatch):
    """Writer and readers, over S3 and HTTP, in the middle of their work."""
    url, link = far
    state = toy_state()
    log, writer = new_writer(url)
    writer.publish(rows_of(state), 0)
    server = serve(open_store(url))
    http_link = BadLink(server.server_port)

    def readers():
        places = (url, f"http://127.0.0.1:{http_link.port}")
        return [Subscriber(WeightLog.open(place), LiveWeights(zeros())) for place in places]

    def cut():
        for each in (link, http_link):
            each.cut()

    def mend_after_the_outage():
        timer = threading.Timer(outage_s, lambda: (link.mend(), http_link.mend()))
        timer.start()
        return timer

    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", str(outage_s / 5))
    hasty = readers()
    hasty_writer = Publisher(WeightLog.open(url), 0, 1, 2, CONFIG)
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", str(outage_s + 60))
    patient = readers()
    patient_writer = Publisher(WeightLog.open(url), 0, 1, log.claim_epoch(takeover=True), CONFIG)

    after = moved(state, 0.1, 1)
    cut()
    for call in [reader.catch_up for reader in hasty]:
        with pytest.raises(StoreError, match=rf"failed for {outage_s / 5:g} s \(GOSSAMER_STORE"):
            call()
    with pytest.raises(StoreError, match=r"^store s3://.* failed for [^\n]*$"):
        hasty_writer.publish(rows_of(after), 1)
    started_s, timer = time.monotonic(), mend_after_the_outage()
    assert patient_writer.publish(rows_of(after), 1).version == 1
    assert time.monotonic() - started_s > outage_s
    timer.join()
    cut()
    timer = mend_after_the_outage()
    assert [reader.catch_up() for reader in patient] == [1, 1]
    timer.join()
    assert same_bits(read_state(log), after)
    http_link.close()
    server.close()


def test_a_link_that_flaps_loses_and_doubles_nothing(far):
    url, link = far
    log, writer = new_writer(url)
    state, live, done = toy_state(), LiveWeights(zeros()), threading.Event()

    def flap():
        seen = 0
        while not done.wait(0.05):
            # by the clock alone, a machine slower than that would never be answered
            if link.passed > seen:
                link.cut()
                link.mend()
                seen = link.passed

    flapping = threading.Thread(target=flap)
    flapping.start()
    subscriber = Subscriber(WeightLog.open(url), live)
    try:
        for step in range(8):
            assert writer.publish(rows_of(state), step).version == step
            subscriber.catch_up()
            assert same_bits(live.tensors, state)
            state = moved(state, 0.05, step)
    finally:
        done.set()
        flapping.join()
    assert log.current_epoch() == 1 and log.versions() == list(range(8))


def test_a_bucket_that_refuses_writes_for_a_while(far, s3_server):
    url, _ = far
    bucket = url.split("/")[2]
    log, writer = new_writer(url)
    state = toy_state()
    writer.publish(rows_of(state), 0)
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject"}
    for effect in ("Deny", "Allow"):
        statement = deny | {"Effect": effect, "Resource": f"arn:aws:s3:::{bucket}/*"}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        s3_server.put(f"{bucket}?policy", json.dumps(policy).encode())
        after = moved(state, 0.1, 1)
        if effect == "Deny":
            with pytest.raises(StoreError, match=r"put parts/00000001-e0001-p0.delta: .*403"):
                writer.publish(rows_of(after), 1)
            assert log.head() == 0 and same_bits(read_state(log), state)
    assert writer.publish(rows_of(after), 1).version == 1
    assert same_bits(read_state(log), after)


@pytest.mark.parametrize(
    "lie",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data + data,
        lambda data: bytes(len(data)),
        lambda data: data[1:] + data[:1],
    ],
)
def test_a_store_that_lies_changes_nothing(tmp_path, lie, monkeypatch):
    log, writer = new_writer(tmp_path)
    state = toy_state()
    writer.publish(rows_of(state), 0)
    live = LiveWeights(zeros())
    subscriber = Subscriber(log, live)
    subscriber.catch_up()
    writer.publish(rows_of(moved(state, 0.1, 1)), 1)
    told = log.store.get

    def get(name, start=0, stop=None):
        data = told(name, start, stop)
        return lie(data) if name.startswith("parts/") else data

    with monkeypatch.context() as patched:
        patched.setattr(log.store, "get", get)
        with pytest.raises((LogError, ApplyError), match="parts/00000001-e0001-p0.delta"):
            subscriber.catch_up()
        assert same_bits(live.tensors, state) and live.version == 0
    assert subscriber.catch_up() == 1


FOREIGN = [
    "manifest-",
    "manifest-00000001.json.bak",
    "manifest-latest.json",
    "manifest-99999999.json (copy)",
    "epoch-0009.json~",
    "fold-1.json",
    "parts/readme.txt",
    "parts/00000000-e0001-p0.delta.partial",
    ".DS_Store",
    "zz/manifest-00000007.json",
]


@pytest.mark.parametrize("scheme", ["file", "s3", "http"])
def test_a_listing_with_foreign_names(far, tmp_path, scheme):
    url = far[0] if scheme == "s3" else str(tmp_path / "log")
    log, writer = new_writer(url)
    states = [toy_state(), moved(toy_state(), 0.1, 1)]
    writer.publish(rows_of(states[0]), 0)
    for name in FOREIGN:
        log.store.put(name, b"not of this log", overwrite=True)
    writer.publish(rows_of(states[1]), 1)
    log.store.delete("HEAD")
    if scheme == "file":
        os.symlink(tmp_path, tmp_path / "log/manifest-00000050.json")
        os.mkdir(tmp_path / "log/manifest-00000051.json")
    server = serve(open_store(url))
    reader = WeightLog.open(server.url if scheme == "http" else url)
    assert reader.versions() == [0, 1] and reader.head() == 1
    assert reader.current_epoch() == 1 and reader.folds() == []
    assert same_bits(read_state(reader), states[1])
    server.close()
