"""ObjectStore against an S3-speaking server, over real HTTP and a link that breaks."""

import json
import os

import pytest
from bad_link import BadLink
from gossamer.comm.live import LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.reader import read_state
from gossamer.comm.store import StoreError, objects, open_store
from gossamer.comm.store.patience import Patience
from gossamer.comm.subscriber import Subscriber
from s3_server import S3Server, s3_environment
from toy_weights import moved, new_writer, rows_of, same_bits, toy_state, zeros

LARGE = bytes(range(256)) * 16_000


@pytest.fixture(scope="module")
def server():
    started = S3Server()
    yield started
    started.close()


@pytest.fixture
def link(server):
    """A link to the server; stores that are opened in the test use it."""
    made = BadLink(server.port)
    with s3_environment(made.port):
        os.environ["GOSSAMER_STORE_PATIENCE_S"] = "5"
        yield made
    made.close()


@pytest.fixture
def store(server, link, tmp_path):
    bucket = tmp_path.name.replace("_", "-")
    server.put(bucket)
    return open_store(f"s3://{bucket}/run")


def test_a_put_whose_answer_was_lost_knows_itself(store, link):
    for turn in range(3):
        link.cuts.append(0)
        assert store.put(f"part-{turn}", b"mine")
    assert not link.cuts
    link.cuts.append(0)
    assert not store.put("part-0", b"another's")
    assert not store.put("part-0", b"mine")  # the same bytes by someone else are not ours
    assert store.get("part-0") == b"mine"
    link.cuts.append(0)
    assert store.put("HEAD", b"7", overwrite=True) and store.get("HEAD") == b"7"


def test_a_cut_body_goes_on_where_it_stopped(store, link):
    store.put("parts/large", LARGE)
    link.passed = 0
    link.cuts += [1_500_000, 1_500_000]
    assert store.get("parts/large") == LARGE
    assert not link.cuts
    assert link.passed < len(LARGE) + 2 * objects.CHUNK_BYTES + 10_000
    link.cuts.append(2_000_000)
    assert store.get("parts/large", 100, len(LARGE) - 100) == LARGE[100:-100]


def test_pieces_of_two_versions_are_never_joined(store, link, monkeypatch):
    store.put("HEAD", LARGE, overwrite=True)
    other, pause = LARGE[::-1], Patience.pause

    def replaced_meanwhile(self, error):
        store.put("HEAD", other, overwrite=True)
        pause(self, error)

    monkeypatch.setattr(Patience, "pause", replaced_meanwhile)
    link.cuts.append(2_000_000)
    assert store.get("HEAD") == other


def test_a_silent_store_is_given_up(store, server, monkeypatch):
    store.put("a", b"1")
    monkeypatch.setattr(objects, "SILENCE_S", 0.2)
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "0.2")
    with server.held():
        for call in (lambda s: s.get("a"), lambda s: s.put("b", b""), lambda s: s.size("a")):
            with pytest.raises(StoreError, match=r"failed for 0.2 s \(GOSSAMER_STORE_PATIENCE_S\)"):
                call(open_store(store.url))


def test_a_listing_of_many_pages_and_foreign_names(store, server, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")
    names = [f"parts/{number:04d}" for number in range(23)]
    for name in names:
        store.put(name, b"")
    bucket = store.url.removeprefix("s3://")
    for foreign in ("parts/", "parts/sub/x", "parts2", "a%2F%2Fb", "%C3%BC%25"):
        server.put(f"{bucket}/{foreign}", b"?")
    assert store.list("parts/") == names
    assert store.list("parts/001") == names[10:20]
    assert "parts2" in store.list("")
    server.put(f"{bucket}/../odd", b"?")
    with pytest.raises(StoreError, match=r"list '': .*invalid path"):
        store.list("")
    assert store.list("parts/") == names


def test_what_a_bucket_refuses_is_one_sentence(store, server, monkeypatch):
    bucket = store.url.split("/")[2]
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject"}
    statement = deny | {"Resource": f"arn:aws:s3:::{bucket}/*"}
    server.put(
        f"{bucket}?policy",
        json.dumps({"Version": "2012-10-17", "Statement": [statement]}).encode(),
    )
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=f"^store s3://{bucket}/run: put a: .*403 Forbidden"):
            store.put("a", b"", overwrite)
    assert store.size("a") is None
    with pytest.raises(StoreError, match="there is no such bucket"):
        open_store("s3://nowhere/run").put("a", b"")
    with pytest.raises(StoreError, match="404 Not Found: The specified bucket does not exist"):
        open_store("s3://nowhere/run").list("")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(StoreError, match="AWS_ALLOW_HTTP=true .* must be set"):
        open_store(store.url).get("a")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreError, match="store az://box/run: .*Account must be specified"):
        open_store("az://box/run")
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "soon")
    with pytest.raises(ValueError, match="GOSSAMER_STORE_PATIENCE_S must be a number of seconds"):
        open_store(store.url)


def test_a_log_in_a_bucket(store, link):
    log, writer = new_writer(store.url)
    state, live = toy_state(), LiveWeights(zeros())
    subscriber = Subscriber(WeightLog.open(store.url), live)
    for step in range(6):
        link.cuts.append(700)  # of any answer
        writer.publish(rows_of(state), step)
        subscriber.catch_up()
        assert same_bits(live.tensors, state)
        state = moved(state, 0.1, step)
    assert log.head() == 5
    assert same_bits(read_state(log), live.tensors)
