"""Writing through a served store: lost answers, cut links, refusals."""

import socket
import threading

import pytest
from bad_link import BadLink
from gossamer.comm.store import StoreError, open_store
from gossamer.comm.store.serve import serve
from test_http_store import raw

LARGE = bytes(range(256)) * 40_000


@pytest.fixture
def behind(tmp_path):
    return open_store(tmp_path / "rounds", create=True)


@pytest.fixture
def link(behind):
    server = serve(behind, writable=True)
    link = BadLink(server.server_port)
    yield link
    link.close()
    server.close()


def test_a_put_whose_answer_was_lost_knows_its_own_file(link, behind):
    mine, rival = (open_store(f"http://127.0.0.1:{link.port}") for _ in range(2))
    link.cuts = [3]
    assert mine.put("round-0", b"mine") and link.connections == 2
    link.cuts = [3]
    assert not rival.put("round-0", b"mine")
    link.cuts = [3]
    mine.delete("round-0")
    assert behind.size("round-0") is None


def test_a_put_goes_through_when_the_link_is_back(link, behind):
    store, sent = open_store(f"http://127.0.0.1:{link.port}"), []
    link.cut()
    writer = threading.Thread(target=lambda: sent.append(store.put("rounds/0/a", LARGE)))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive() and behind.list("rounds/0/") == []
    link.mend()
    writer.join(60)
    assert sent == [True] and behind.get("rounds/0/a") == LARGE


def test_half_a_body_is_no_file(behind):
    server = serve(behind, writable=True)
    link = BadLink(server.server_port)
    with socket.create_connection(("127.0.0.1", link.port)) as half:
        half.sendall(b"PUT /a HTTP/1.1\r\nContent-Length: 100\r\n\r\n0123456789")
    assert open_store(server.url).put("b", b"") and behind.list("") == ["b"]
    link.close()
    server.close()


def test_a_server_that_is_read_only_says_so_of_a_large_put_too(behind):
    server = serve(behind)
    with pytest.raises(StoreError, match="is read only: a must be put where it lies"):
        open_store(server.url).put("a", LARGE)
    server.close()


def test_who_may_write(behind, monkeypatch):
    monkeypatch.setenv("GOSSAMER_LOG_TOKEN", "sesame")
    server = serve(behind, writable=True)
    store = open_store(server.url)
    assert store.put("a", b"1")
    monkeypatch.setenv("GOSSAMER_LOG_TOKEN", "other")
    for call in (lambda: store.put("a", LARGE, overwrite=True), lambda: store.delete("a")):
        with pytest.raises(StoreError, match="401 Unauthorized; GOSSAMER_LOG_TOKEN"):
            call()
    assert behind.get("a") == b"1"
    server.close()


def test_only_files_inside_are_written(behind, tmp_path):
    server = serve(behind, writable=True)
    for target in ("/../out", "/%2e%2e/out", "/a/../../out", "/.tmp-1", "/a/.b"):
        status = raw(server, "PUT", target, {"Content-Length": "0"})[0]
        assert status == 404, target
    assert raw(server, "PUT", "/a")[0] == 411
    assert [path.name for path in tmp_path.iterdir()] == ["rounds"] and behind.list("") == []
    server.close()
